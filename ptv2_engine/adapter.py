"""Adapter folders: adapter_model.safetensors (prompt and head) and adapter_config.json, written atomically.

The tensors carry PEFT's names and the prompt PEFT's (and the published code's) layout, so where PEFT can express the
adapter the folder *is* a PEFT PREFIX_TUNING adapter. What PEFT cannot hold (backbone fingerprint, prompt layers, labels,
the reparameterization's weights, banks of several prompts) lies in a `ptv2` section and under `ptv2.` keys. The whole
configuration is repeated in the safetensors header: that one file is complete by itself and is replaced in one step, so a
crash leaves the old adapter or the new one. Nothing is ever unpickled.

Where the backbone trains, the tensors of it that do lie under `ptv2.encoder.` in fp32: 4 bytes a weight with fine-tuning
(BERT-base: 440 MB), 4 bytes a bias with BitFit (0.4 MB). They replace those of the backbone that the adapter names, which it
still needs.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ptv2_engine import __version__
from ptv2_engine.cloze import ClozeHead
from ptv2_engine.encoder import Encoder, Origin, load_encoder
from ptv2_engine.encoder.checkpoints import open_safetensors
from ptv2_engine.encoder.weights import check_placement
from ptv2_engine.errors import AdapterError, AdapterMismatch, CheckpointError, ConfigError, OutputError, WeightError
from ptv2_engine.heads import SpanHead
from ptv2_engine.masked_lm import masked_lm_for
from ptv2_engine.prompt import PromptBank, PromptConfig

if TYPE_CHECKING:
    from ptv2_engine.model import PromptedModel

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DATA_SETS = "ptv2_data_sets.json"       # of a prompt that several data sets share: the folders with their adapters
_PEFT_TASK = {"sequence-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS", "question-answering": "QUESTION_ANS"}
POOLED = ("sequence-classification", "multiple-choice")      # tasks whose head reads the pooler's output
_OWN = "ptv2."          # keys that only this package reads


def peft_obstacles(model: PromptedModel) -> list[str]:
    """Why PEFT's PREFIX_TUNING cannot express this adapter; empty when it can."""
    prompt, encoder = model.prompt_config, model.encoder.config
    reasons = []
    if prompt.method != "deep":
        reasons.append(f"method {prompt.method!r} (PEFT pools another token for input prompts)")
    elif prompt.layers(encoder.num_layers) != list(range(encoder.num_layers)):
        reasons.append(f"prompt_layers {prompt.prompt_layers!r} (PEFT prompts every layer)")
    if prompt.num_prompts > 1:
        reasons.append(f"num_prompts {prompt.num_prompts}")
    if prompt.prompt_lengths is not None:
        reasons.append(f"prompt_lengths {prompt.prompt_lengths}")
    if not model.shift_positions:
        reasons.append("shift_positions=False")
    if model.task not in _PEFT_TASK:
        reasons.append(f"task {model.task} (PEFT has no such task)")
    if model.encoder.trained_backbone is not None:
        reasons.append(f"trained_backbone {model.encoder.trained_backbone!r} (PEFT's backbone stays as it is)")
    if encoder.family not in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
        reasons.append(f"a {encoder.family} backbone (PEFT's prefix tuning needs past_key_values, which it does not take)")
    if encoder.family == "bert" and model.task == "sequence-classification" and model.pooler_kind == "trained":
        reasons.append("a trained pooler on BERT")
    return reasons


def _head_tensors(model: PromptedModel) -> dict[str, Tensor]:
    """The head under PEFT's names. RoBERTa's frozen pooler + classifier is its dense + out_proj (equal in eval mode)."""
    head, encoder = model.head, model.encoder
    if isinstance(head, ClozeHead):
        return {}
    if isinstance(head, SpanHead):
        return {f"base_model.qa_outputs.{w}": getattr(head.qa_outputs, w) for w in ("weight", "bias")}
    classifier = {w: getattr(head.classifier, w) for w in ("weight", "bias")}
    dense = getattr(head, "dense", None)
    plain = encoder.config.family == "bert" or encoder.trained_backbone is not None      # a trained pooler is the encoder's
    if model.task in POOLED and (dense is not None or not plain):
        dense = encoder.pooler if dense is None else dense
        return {f"base_model.classifier.{name}.{w}": getattr(linear, w) for w in ("weight", "bias")
                for name, linear in (("dense", dense), ("out_proj", head.classifier))}
    return {f"base_model.classifier.{w}": t for w, t in classifier.items()}


def uses_frozen_pooler(model: PromptedModel) -> bool:
    return model.task in POOLED and model.pooler_kind == "frozen"


def tensors_of(model: PromptedModel, peft_only: bool = False) -> dict[str, Tensor]:
    """Name -> fp32 CPU tensor of everything the file holds."""
    found = _head_tensors(model)
    if model.prompt is not None:
        rows_KPW = model.prompt.rows()
        found["prompt_embeddings"] = rows_KPW[0] if rows_KPW.shape[0] == 1 else rows_KPW
        if model.prompt_config.reparameterization is not None and not peft_only:
            found |= {f"{_OWN}prompt.{name}": p for name, p in model.prompt.named_parameters()}
    found |= {f"{_OWN}encoder.{name}": p for name, p in trained_weights(model).items()}
    return {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in found.items()}


def trained_weights(model: PromptedModel) -> dict[str, nn.Parameter]:
    """The encoder's parameters that train, by their name in it."""
    return {name: p for name, p in model.encoder.named_parameters() if p.requires_grad}


def config_of(model: PromptedModel, peft_only: bool = False) -> dict[str, Any]:
    """PEFT's keys and the ptv2 section."""
    encoder, prompt = model.encoder.config, model.prompt_config
    location = model.origin.location
    if os.path.isdir(location):
        location = os.path.abspath(location)
    config: dict[str, Any] = {
        "peft_type": "PTV2" if peft_obstacles(model) else "PREFIX_TUNING", "task_type": _PEFT_TASK.get(model.task),
        "base_model_name_or_path": location, "num_virtual_tokens": prompt.prompt_length, "token_dim": encoder.hidden_size,
        "num_layers": encoder.num_layers, "num_attention_heads": encoder.num_heads, "num_transformer_submodules": 1,
        "encoder_hidden_size": encoder.hidden_size, "prefix_projection": False,
        "modules_to_save": ["qa_outputs"] if model.task == "question-answering" else ["classifier", "score"],
        "inference_mode": True, "auto_mapping": None, "revision": None,
    }
    if not peft_only:
        config["ptv2"] = {
            "version": __version__, "backbone": location, "backbone_hash": model.origin.weights_hash, "task": model.task,
            "frozen_dtype": model.encoder.frozen_dtype,
            "pooler_hash": model.origin.pooler_hash if uses_frozen_pooler(model) else "",
            "id2label": model.id2label, "problem_type": model.problem_type, "pooler": model.pooler_kind,
            "shift_positions": model.shift_positions, "prompt": prompt.to_dict(), "tokenizer": location,
        }
        if model.encoder.trained_backbone is not None:
            config["ptv2"]["trained_backbone"] = model.encoder.trained_backbone
        if isinstance(model.head, ClozeHead):
            ids = model.head.verbalizer_ids
            config["ptv2"]["cloze"] = {"verbalizer_ids": None if ids is None else ids.tolist(),
                                       "length_penalty": model.head.length_penalty, "mix_loss": model.head.mix_loss}
    return config


def save(model: PromptedModel, folder: str | Path, peft_only: bool = False) -> None:
    """Write the adapter. Raises AdapterError (peft_only and PEFT cannot express it) or OutputError, before any write."""
    if peft_only and (obstacles := peft_obstacles(model)):
        raise AdapterError(f"PEFT's PREFIX_TUNING cannot express {'; '.join(obstacles)}; use save_pretrained, which can.")
    from safetensors.torch import save as serialise

    config = json.dumps(config_of(model, peft_only), indent=2)
    metadata = {"format": "pt"} if peft_only else {"format": "pt", "ptv2_config": config}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / TENSORS, serialise(tensors_of(model, peft_only), metadata))
        replace_file(folder / CONFIG, config.encode())
    except OSError as error:
        raise OutputError(f"cannot write the adapter to {folder} ({error.strerror or error}); "
                          "choose a folder you may write to, with free space.") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new: temporary neighbour, flush to disk, rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header's metadata of a safetensors file. Raises AdapterError or CheckpointError."""
    if not file.is_file():
        pickled = file.with_name("adapter_model.bin")
        hint = (f"it has {pickled.name}, a pickle; save it again with safetensors" if pickled.is_file()
                else "pass the folder that save_pretrained wrote")
        raise AdapterError(f"{file.parent} holds no {file.name}; {hint}.")
    handle = open_safetensors(file)
    return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118


def read_config(folder: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The configuration in the header, else adapter_config.json. Raises CheckpointError when that is not JSON."""
    try:
        if "ptv2_config" in metadata:
            return json.loads(metadata["ptv2_config"])
        return json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise AdapterError(f"{folder} holds no {CONFIG}; pass the folder that save_pretrained wrote.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not valid JSON ({error}); save the adapter again.") from error


def load(cls: type[PromptedModel], folder: str | Path, backbone: str | Path | nn.Module | None,
         placement: dict[str, Any]) -> PromptedModel:
    """The model an adapter folder describes; placement: load_encoder's dtype, device and so on. Raises AdapterError,
    AdapterMismatch, CheckpointError, WeightError."""
    folder = Path(folder)
    tensors, metadata = read_tensors(folder / TENSORS)
    config = read_config(folder, metadata)
    if "ptv2" not in config:
        raise AdapterError(f"{folder} is a {config.get('peft_type', 'foreign')} adapter that this package did not write; "
                           "use PromptedModel.from_peft(folder, base).")
    own = config["ptv2"]
    try:
        prompt = PromptConfig(**own["prompt"] | {"init": "normal"})
        settings = {name: own[name] for name in ("task", "pooler", "problem_type", "shift_positions")}
        settings["id2label"] = {int(i): name for i, name in own["id2label"].items()}
        name, hashes, init = own["backbone"], (own["backbone_hash"], own["pooler_hash"]), own["prompt"]["init"]
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{folder} was saved by version {own.get('version') if isinstance(own, dict) else None} and this is "
                           f"{__version__}, which cannot read its settings ({error}); use that version.") from error
    if settings["task"] not in POOLED:
        settings["pooler"] = "auto"
    settings |= own.get("cloze", {})
    if (kind := own.get("frozen_dtype")) is not None and "frozen_dtype" not in placement:
        if placement.get("stream_weights") == "file":
            raise ConfigError(f"{folder} was trained on {kind} weights, which cannot be streamed from a file; use "
                              "stream_weights='host', or frozen_dtype=None (--frozen_dtype none) for the checkpoint's own.")
        placement = placement | {"frozen_dtype": kind}
    if (trained := own.get("trained_backbone")) is not None:
        settings["trained_backbone"] = trained
        placement = placement | {"trained_backbone": trained}
    encoder, origin = _load_backbone(folder, name, placement) if backbone is None else load_encoder(backbone, **placement)
    for part, theirs, ours in (("weights", hashes[0], origin.weights_hash), ("pooler", hashes[1], origin.pooler_hash)):
        if theirs and theirs != ours:
            raise AdapterMismatch(f"{folder} was trained on {name} ({part} {theirs[:12]}), but {origin.location} has other "
                                  f"{part} ({ours[:12] or 'none'}); pass the original one (backbone=, --backbone).")
    if settings["task"] == "cloze":
        settings["masked_lm"] = masked_lm_for(encoder, name if backbone is None else backbone)
    model = cls(encoder, origin, prompt, **settings)
    model.prompt_config.init = init
    fill(model, tensors, folder)
    return model.eval()


def _load_backbone(folder: Path, name: str, placement: dict[str, Any]) -> tuple[Encoder, Origin]:
    """The backbone an adapter names, or AdapterError saying how to pass another."""
    check_placement(placement.get("frozen_dtype"), placement.get("stream_weights"))
    try:
        return load_encoder(name, **placement)
    except (ConfigError, WeightError) as error:
        raise AdapterError(f"{folder} was trained on {name}, which cannot be loaded from there; pass its folder (backbone=, "
                           "--backbone), "
                           f"hub id or model that holds it ({error})") from error


def fill(model: PromptedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy the file's tensors into prompt, head and what trains of the backbone. Raises AdapterError naming a missing or
    mis-shaped one."""
    for name, parameter in trained_weights(model).items():
        _assign(parameter, tensors.get(f"{_OWN}encoder.{name}"), f"{_OWN}encoder.{name}", folder)
    if model.prompt is not None:
        fill_prompt(model.prompt, tensors, folder)
    if isinstance(model.head, ClozeHead):
        return
    if isinstance(model.head, SpanHead):
        _copy(model.head.qa_outputs, tensors, "base_model.qa_outputs.", folder)
        return
    prefix = "base_model.classifier."
    split = f"{prefix}out_proj.weight" in tensors
    _copy(model.head.classifier, tensors, f"{prefix}out_proj." if split else prefix, folder)
    if isinstance(dense := getattr(model.head, "dense", None), nn.Linear):
        if not split:
            raise AdapterError(f"{folder} relies on the backbone's pretrained pooler, but {model.origin.location} has none; "
                               "pass the checkpoint with its pooler as the base.")
        _copy(dense, tensors, f"{prefix}dense.", folder)


def refill(model: PromptedModel, folder: Path) -> None:
    """Fill a model that is there already from a saved adapter, to go on with it. Raises AdapterError, also where the adapter is
    of another task or has other labels: its head would name them wrongly."""
    tensors, metadata = read_tensors(folder / TENSORS)
    own = read_config(folder, metadata).get("ptv2", {})
    labels = {int(i): name for i, name in own.get("id2label", {}).items()}
    if own and (own.get("task"), labels) != (model.task, model.id2label):
        raise AdapterError(f"{folder} was trained for {own.get('task')} with the labels {', '.join(map(str, labels.values()))}, "
                           f"but this model is for {model.task} with {', '.join(map(str, model.id2label.values()))}; resume with "
                           "the data it was trained on.")
    fill(model, tensors, folder)


def fill_prompt(bank: PromptBank, tensors: dict[str, Tensor], folder: Path) -> None:
    """The reparameterization's weights where both have them, else the prompt itself."""
    if bank.config.reparameterization is not None:
        own = {name.removeprefix(f"{_OWN}prompt."): t for name, t in tensors.items() if name.startswith(f"{_OWN}prompt.")}
        for name, parameter in bank.named_parameters():
            _assign(parameter, own.get(name), f"{_OWN}prompt.{name}", folder)
        return
    rows = tensors.get("prompt_embeddings")
    _assign(bank.bank, rows if rows is None or rows.dim() == 3 else rows[None], "prompt_embeddings", folder)


def load_prompt_into(bank: PromptBank, folder: str | Path) -> None:
    """Start a prompt from a saved adapter's (PromptConfig.init = its folder), or from one that data sets shared. The head stays
    fresh."""
    path = Path(folder)
    if (path / DATA_SETS).is_file() and not (path / TENSORS).is_file():
        path = path / json.loads((path / DATA_SETS).read_text())[0]
    tensors, _ = read_tensors(path / TENSORS)
    if not any(name.startswith("prompt") for name in tensors):
        raise AdapterError(f"{folder} holds no prompt to start from; pass an adapter that was trained with one (--method "
                           "p-tuning-v2, ...), or leave --init out.")
    fill_prompt(bank, tensors, path)


def _copy(linear: nn.Linear, tensors: dict[str, Tensor], prefix: str, folder: Path) -> None:
    for name in ("weight", "bias"):
        _assign(getattr(linear, name), tensors.get(prefix + name), prefix + name, folder)


def _assign(parameter: Tensor, value: Tensor | None, name: str, folder: Path) -> None:
    if value is None:
        raise AdapterError(f"{folder} lacks the tensor {name}; it was saved by another version or for another task.")
    if value.shape != parameter.shape:
        raise AdapterError(f"{folder}: {name} is {tuple(value.shape)}, but {tuple(parameter.shape)} is expected; "
                           "prompt length, layers, labels or backbone differ from the saved adapter's.")
    with torch.no_grad():
        parameter.copy_(value)
