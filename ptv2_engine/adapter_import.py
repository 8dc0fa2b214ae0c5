"""Adapters of other programs -> PromptedModel: PEFT's PREFIX_TUNING folders and the published code's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ptv2_engine.adapter import POOLED, TENSORS, fill, read_config, read_tensors
from ptv2_engine.encoder import load_encoder
from ptv2_engine.encoder.checkpoints import TensorDictionary, load_bin
from ptv2_engine.encoder.weights import fingerprints
from ptv2_engine.errors import AdapterError, AdapterMismatch
from ptv2_engine.prompt import PromptConfig

if TYPE_CHECKING:
    from ptv2_engine.model import PromptedModel

_TASKS = {"SEQ_CLS": "sequence-classification", "TOKEN_CLS": "token-classification", "QUESTION_ANS": "question-answering"}


def from_peft(cls: type[PromptedModel], folder: str | Path, base: str | Path | nn.Module | None = None, *,
              dtype: torch.dtype | None = None, device: str | torch.device = "cpu", **options: Any) -> PromptedModel:
    """Load a PEFT PREFIX_TUNING adapter (SEQ_CLS, TOKEN_CLS or QUESTION_ANS) on `base`, by default the model it names.

    RoBERTa-like and ELECTRA sequence heads are dense + out_proj in PEFT, both trained: the model gets pooler="trained".
    PEFT drops the token_type_ids of question answering: such an adapter gives its own numbers without them.
    PEFT has no prefix dropout, so the prompt gets 0. A prefix projection comes flattened: PEFT does not save the MLP.
    Raises AdapterError for another kind of adapter.
    """
    folder = Path(folder)
    tensors, metadata = read_tensors(folder / TENSORS)
    config = read_config(folder, metadata)
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "PREFIX_TUNING" or task not in _TASKS:
        raise AdapterError(f"{folder} is a {kind} adapter for {task}; PREFIX_TUNING for {' or '.join(_TASKS)} can be imported.")
    rows = tensors.get("prompt_embeddings")
    if rows is None:
        raise AdapterError(f"{folder} lacks the tensor prompt_embeddings; it is not a complete PREFIX_TUNING adapter.")
    split = "base_model.classifier.out_proj.weight" in tensors
    head = "qa_outputs" if task == "QUESTION_ANS" else "classifier"
    weight = tensors.get("base_model.classifier.out_proj.weight" if split else f"base_model.{head}.weight")
    if weight is None:
        raise AdapterError(f"{folder} lacks the head's weights; save it with modules_to_save=[{head!r}].")
    source = config.get("base_model_name_or_path") if base is None else base
    if source is None:
        raise AdapterError(f"{folder} does not name its base model; pass base=.")
    encoder, origin = load_encoder(source, dtype=dtype, device=device)
    _check_width(rows, encoder.config, folder)
    options = {"pooler": "trained" if split else "auto", "num_labels": weight.shape[0]} | options
    model = cls(encoder, origin, PromptConfig(prompt_length=rows.shape[0], prompt_dropout=0.0), task=_TASKS[task], **options)
    fill(model, tensors, folder)
    return model.eval()


def from_thudm(cls: type[PromptedModel], file: str | Path, base: str | Path | nn.Module, *, task: str | None = None,
               dtype: torch.dtype | None = None, device: str | torch.device = "cpu", **options: Any) -> PromptedModel:
    """Load prompt and head of a checkpoint of the published P-Tuning v2 code; the backbone comes from `base`.

    Where the checkpoint's frozen pooler is not the base's (the base has none, so it was drawn at random), it becomes the head's
    dense layer and trains on from there.

    Arguments:
        file: its pytorch_model.bin (read with weights_only) or model.safetensors, or the folder of either.
        task: by default question answering when the checkpoint has its head, else sequence classification when it has a pooler,
            else token classification. Multiple choice looks like sequence classification: name it.
    Raises:
        AdapterError: no prefix or no classifier in it. AdapterMismatch: the checkpoint holds another backbone than `base`.
        CheckpointError: corrupt, or an unsafe pickle.
    """
    path = Path(file)
    if path.is_dir():
        safe = path / "model.safetensors"
        path = safe if safe.is_file() else path / "pytorch_model.bin"
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; pass the published code's pytorch_model.bin or its folder.")
    state: dict[str, Tensor] = read_tensors(path)[0] if path.suffix == ".safetensors" else load_bin(path)
    head = "qa_outputs" if "qa_outputs.weight" in state else "classifier"
    for name in ("prefix_encoder.embedding.weight", f"{head}.weight", f"{head}.bias"):
        if name not in state:
            raise AdapterError(f"{path} lacks {name}; it is not a checkpoint of P-Tuning v2 (the published shallow prompts "
                               "cannot be imported: they embed tokens twice).")
    embedding = state["prefix_encoder.embedding.weight"]
    projected = "prefix_encoder.trans.0.weight" in state
    pooled = "sequence-classification" if any("pooler." in n for n in state) else "token-classification"
    task = task or ("question-answering" if head == "qa_outputs" else pooled)
    encoder, origin = load_encoder(base, dtype=dtype, device=device)
    backbone = TensorDictionary(str(path), origin.config, state)
    theirs, pooler = fingerprints(backbone)
    if theirs and theirs != origin.weights_hash:
        raise AdapterMismatch(f"{path} holds a backbone (weights {theirs[:12]}) that is not {origin.location} "
                              f"({origin.weights_hash[:12]}); pass the base model it was trained on.")
    prompt = PromptConfig(prompt_length=embedding.shape[0], reparameterization="mlp" if projected else None,
                          reparameterization_hidden=state["prefix_encoder.trans.0.weight"].shape[0] if projected else 512)
    trained_pooler = "pooler.dense.weight" in state           # DeBERTa's ContextPooler, outside the backbone
    own_pooler = task in POOLED and (trained_pooler or bool(pooler) and pooler != origin.pooler_hash)
    tensors = {f"base_model.{head}.{'out_proj.' * own_pooler}{w}": state[f"{head}.{w}"] for w in ("weight", "bias")}
    if own_pooler:
        options = {"pooler": "trained"} | options
        tensors |= {f"base_model.classifier.dense.{w}": t for w in ("weight", "bias")
                    for n, t in state.items() if n.endswith(f"pooler.dense.{w}")}
    if projected:
        tensors["ptv2.prompt.embedding"] = embedding[None]
        tensors |= {f"ptv2.prompt.network.{i}.{w}": state[f"prefix_encoder.trans.{i}.{w}"]
                    for i in (0, 2) for w in ("weight", "bias")}
    else:
        _check_width(embedding, encoder.config, path)
        tensors["prompt_embeddings"] = embedding
    model = cls(encoder, origin, prompt, task=task, **{"num_labels": state[f"{head}.weight"].shape[0]} | options)
    fill(model, tensors, path)
    return model.eval()


def _check_width(rows: Tensor, encoder: Any, where: Path) -> None:
    width = 2 * encoder.num_layers * encoder.hidden_size
    if rows.shape[1] != width:
        raise AdapterError(f"{where}: prompt rows have {rows.shape[1]} values, but {encoder.num_layers} layers of hidden size "
                           f"{encoder.hidden_size} need {width}; pass the base model it was trained on.")
