"""A checkpoint's tensors -> the encoder's parameters, by the family's name map, one tensor at a time.

The encoder is built on the meta device and each parameter is assigned straight in its target dtype and on its device, so
memory peaks at the weights plus one tensor. A tensor that needs no cast, move or concatenation keeps its storage: the
memory-mapped file's, or the transformers model's. Only the fused q, k, v projection is always a new copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptv2_engine.encoder import bert, deberta, deberta_v2, electra, glm, modernbert, roberta
from ptv2_engine.encoder.checkpoints import Checkpoint, open_checkpoint
from ptv2_engine.encoder.config import EncoderConfig
from ptv2_engine.encoder.sources import Source
from ptv2_engine.encoder.stack import Encoder
from ptv2_engine.errors import ConfigError, WeightError

FAMILIES = {model_type: family for family in (bert, roberta, electra, deberta, deberta_v2, glm, modernbert)
            for model_type in family.MODEL_TYPES}
_HASH_SAMPLES = 256


class Origin(NamedTuple):
    """Where an encoder came from, for the adapter file."""

    location: str
    config: dict[str, Any]      # the checkpoint's config.json
    weights_hash: str           # of the encoder without its pooler, which heads of transformers may leave out
    pooler_hash: str            # empty where there is none


def family_of(config: Mapping[str, Any]) -> ModuleType:
    """The family file for a config.json. Raises ConfigError for a model type that has none."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} has no encoder here (there are {', '.join(sorted(FAMILIES))}); "
                          "pass a checkpoint of one of these families.")
    return FAMILIES[model_type]


def _canonical(checkpoint: Checkpoint, family: ModuleType) -> dict[str, str]:
    """Name without the model's prefix -> name in the checkpoint, for the encoder's part of it.

    Also renames the LayerNorm.gamma / .beta of the first BERT checkpoints.
    """
    names = list(checkpoint.names())
    anchor = getattr(family, "ANCHOR", "embeddings.")      # how names start once the model's own prefix is gone
    prefix = next((p for p in family.PREFIXES if any(n.startswith(f"{p}{anchor}") for n in names)), "")
    found = {}
    for name in names:
        if not name.startswith(prefix):
            continue
        short = name[len(prefix):]
        if short.startswith(family.HEADS) or short in family.BUFFERS:
            continue
        found[short.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = name
    return found


def _check_names(location: str, needed: Iterable[str], optional: set[str], found: Mapping[str, str]) -> None:
    needed = set(needed)
    missing, extra = sorted(needed - set(found)), sorted(set(found) - needed - optional)
    for kind, names, way in (("lacks", missing, "pass a complete checkpoint of this family"),
                             ("has the unknown", extra, "its architecture is not the one its config.json names")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise WeightError(f"{location} {kind} weight {', '.join(names[:3])}{more}; {way}.")


def _needed(table: Mapping[str, Source]) -> set[str]:
    """The checkpoint's tensors that a name map reads."""
    return {name for source in table.values() for name in source.names}


def _owner(module: nn.Module, dotted: str) -> tuple[nn.Module, str]:
    path, _, leaf = dotted.rpartition(".")
    return module.get_submodule(path), leaf


def _assemble(checkpoint: Checkpoint, source: Source, found: Mapping[str, str], shape: torch.Size, dtype: torch.dtype,
              device: torch.device) -> Tensor:
    """The tensor of `shape` in dtype on device; several tensors are concatenated along dim 0 straight into place."""
    names = [found[name] for name in source.names]
    if not names:
        return torch.zeros(shape, dtype=dtype, device=device)
    if source.make is not None:
        tensor = source.make([checkpoint.get(name).detach() for name in names])
        _check_shape(checkpoint, names[0], tensor, shape)
        return tensor.to(device=device, dtype=dtype).contiguous()
    if len(names) == 1:
        tensor = checkpoint.get(names[0]).detach()
        _check_shape(checkpoint, names[0], tensor, shape)
        return tensor.to(device=device, dtype=dtype).contiguous()
    part = torch.Size((shape[0] // len(names), *shape[1:]))
    out = torch.empty(shape, dtype=dtype, device=device)
    for slot, name in zip(out.chunk(len(names)), names, strict=True):
        tensor = checkpoint.get(name).detach()
        _check_shape(checkpoint, name, tensor, part)
        slot.copy_(tensor)
    return out


def _check_shape(checkpoint: Checkpoint, name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise WeightError(f"{checkpoint.location}: weight {name} is {tuple(tensor.shape)}, but config.json implies "
                          f"{tuple(shape)}; the two files do not belong together.")


def _pick_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    dtype = checkpoint.get(name).dtype
    return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32


def empty_encoder(config: Mapping[str, Any]) -> Encoder:
    """The encoder a config.json describes, on the meta device: sizes and names without memory. Raises ConfigError."""
    family = family_of(config)
    return getattr(family, "ENCODER", Encoder)(family.read_config(config), bool(family.POOLER))


def load_encoder(source: str | Path | nn.Module, *, dtype: torch.dtype | None = None,
                 device: str | torch.device = "cpu") -> tuple[Encoder, Origin]:
    """Load a frozen encoder.

    Arguments:
        source: hub id, local folder, or a transformers model in memory (bare or with any head).
        dtype: of the weights; None keeps the checkpoint's float32 or bfloat16 and widens anything else to float32.
    Raises:
        ConfigError: a family or switch this stack does not have. WeightError: a weight missing, unknown or mis-shaped.
        CheckpointError: a corrupt file or an unsafe pickle.
    """
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint.config)
    config: EncoderConfig = family.read_config(checkpoint.config)
    found = _canonical(checkpoint, family)
    pooler = _needed(family.POOLER)
    with_pooler = bool(pooler & set(found))
    table = family.names(config) | (family.POOLER if with_pooler else {})
    _check_names(checkpoint.location, _needed(table), pooler | set(getattr(family, "UNUSED", ())), found)

    device = torch.device(device)
    dtype = dtype or _pick_dtype(checkpoint, found[table["embeddings.word"].names[0]])
    encoder: Encoder = getattr(family, "ENCODER", Encoder)(config, with_pooler)
    for ours, theirs in table.items():
        owner, leaf = _owner(encoder, ours)
        tensor = _assemble(checkpoint, theirs, found, getattr(owner, leaf).shape, dtype, device)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    encoder.finish_loading()
    return encoder, Origin(checkpoint.location, checkpoint.config, *fingerprints(checkpoint))


def fingerprints(checkpoint: Checkpoint) -> tuple[str, str]:
    """weights_hash of the encoder and of its pooler; empty for a part that the checkpoint does not hold in full."""
    family = family_of(checkpoint.config)
    found = _canonical(checkpoint, family)
    hashes = []
    for table in (family.names(family.read_config(checkpoint.config)), family.POOLER):
        shorts = sorted(_needed(table))
        complete = bool(shorts) and all(short in found for short in shorts)
        hashes.append(weights_hash(checkpoint, {short: found[short] for short in shorts}) if complete else "")
    return hashes[0], hashes[1]


def weights_hash(checkpoint: Checkpoint, names: Mapping[str, str]) -> str:
    """A fingerprint of an encoder: sha256 over names, shapes and 256 evenly spaced values of each tensor, in bfloat16.

    Rounding to bfloat16 makes a checkpoint and its bfloat16 copy the same backbone. Cheap: a few kilobytes are read.
    """
    digest = hashlib.sha256()
    for short in sorted(names):
        tensor = checkpoint.get(names[short]).detach()
        digest.update(f"{short}{tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        picks = torch.arange(0, flat.numel(), max(flat.numel() // _HASH_SAMPLES, 1))[:_HASH_SAMPLES]
        values = flat[picks.to(flat.device)].to("cpu", torch.bfloat16)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
