"""A checkpoint's tensors -> the encoder's parameters, by the family's name map, one tensor at a time.

The encoder is built on the meta device and each parameter is assigned straight in its target dtype and on its device (quantised,
or moved to the host, at once where that is asked for), so memory peaks at the weights plus one tensor. A tensor that needs no
cast, move or concatenation keeps its storage: the memory-mapped file's, or the transformers model's. Only the fused q, k, v
projection is always a new copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptv2_engine.encoder import bert, deberta, deberta_v2, electra, glm, modernbert, roberta
from ptv2_engine.encoder.checkpoints import Checkpoint, SafetensorsFiles, open_checkpoint
from ptv2_engine.encoder.config import EncoderConfig
from ptv2_engine.encoder.sources import Source
from ptv2_engine.encoder.stack import Encoder, check_trained
from ptv2_engine.encoder.streaming import FileBlocks, HostBlocks, layout_of, matrices, start_stream
from ptv2_engine.errors import ConfigError, WeightError
from ptv2_engine.ops import KINDS, FrozenLinear, Quantised, quantise
from ptv2_engine.ops.frozen_linear import PLAIN

FAMILIES = {model_type: family for family in (bert, roberta, electra, deberta, deberta_v2, glm, modernbert)
            for model_type in family.MODEL_TYPES}
FROZEN_DTYPES = ("bf16", *KINDS)
_COMPUTE_DTYPES = (None, torch.bfloat16, torch.float32, torch.float16, torch.float64)
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
    if not source.names:
        return torch.zeros(shape, dtype=dtype, device=device)
    if source.make is not None or len(source.names) == 1:
        return _single(checkpoint, source, found, shape).to(device=device, dtype=dtype).contiguous()
    out = torch.empty(shape, dtype=dtype, device=device)
    _write(checkpoint, source, found, out)
    return out


def _single(checkpoint: Checkpoint, source: Source, found: Mapping[str, str], shape: torch.Size) -> Tensor:
    tensors = [checkpoint.get(found[name]).detach() for name in source.names]
    tensor = tensors[0] if source.make is None else source.make(tensors)
    _check_shape(checkpoint, found[source.names[0]], tensor, shape)
    return tensor


def _write(checkpoint: Checkpoint, source: Source, found: Mapping[str, str], out: Tensor) -> None:
    """Fill `out` with a tensor, or with several, concatenated along dim 0."""
    if source.make is not None or len(source.names) == 1:
        out.copy_(_single(checkpoint, source, found, out.shape))
        return
    part = torch.Size((out.shape[0] // len(source.names), *out.shape[1:]))
    for slot, name in zip(out.chunk(len(source.names)), source.names, strict=True):
        tensor = checkpoint.get(found[name]).detach()
        _check_shape(checkpoint, found[name], tensor, part)
        slot.copy_(tensor)


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


def load_encoder(source: str | Path | nn.Module, *, dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu",
                 frozen_dtype: str | None = None, stream_weights: str | None = None,
                 trained_backbone: str | None = None) -> tuple[Encoder, Origin]:
    """Load an encoder.

    Arguments:
        source: hub id, local folder, or a transformers model in memory (bare or with any head).
        dtype: of the weights and of the computation; None keeps the checkpoint's float32 or bfloat16 and widens anything else to
            float32.
        frozen_dtype: "int8", "fp8" or "nf4" keeps the layers' matrices in these codes, "bf16" in bfloat16 beside a wider dtype;
            each is encoded as soon as it is read: memory peaks at the small model and one matrix. None: dtype.
        stream_weights: "host": the layers' matrices stay in host memory and visit the device when they are used. "file": they
            stay in the checkpoint's memory-mapped files, which then must stay in place. None: on the device.
        trained_backbone: "all" or "bias" loads it for Encoder.train_backbone, in float32; None: frozen.
    Raises:
        ConfigError: a family or switch this stack does not have, or options that exclude each other. WeightError: a weight
        missing, unknown or mis-shaped. CheckpointError: a corrupt file or an unsafe pickle.
    """
    check_placement(frozen_dtype, stream_weights)
    device, dtype = check_device(device, dtype)
    dtype = torch.float32 if dtype is None and trained_backbone is not None else dtype
    check_trained(trained_backbone, "exact", frozen_dtype, stream_weights, dtype or torch.float32)
    if stream_weights == "file" and isinstance(source, nn.Module):
        raise ConfigError("stream_weights 'file' reads memory-mapped safetensors, but the source is a model in memory; pass its "
                          "folder or hub id.")
    checkpoint = open_checkpoint(source)
    if stream_weights == "file" and not isinstance(checkpoint, SafetensorsFiles):
        raise ConfigError(f"stream_weights 'file' reads memory-mapped safetensors, but {checkpoint.location} is none; save it as "
                          "safetensors, or use stream_weights='host'.")
    family = family_of(checkpoint.config)
    config: EncoderConfig = family.read_config(checkpoint.config)
    found = _canonical(checkpoint, family)
    pooler = _needed(family.POOLER)
    with_pooler = bool(pooler & set(found))
    table = family.names(config) | (family.POOLER if with_pooler else {})
    _check_names(checkpoint.location, _needed(table), pooler | set(getattr(family, "UNUSED", ())), found)

    dtype = dtype or _pick_dtype(checkpoint, found[table["embeddings.word"].names[0]])
    encoder: Encoder = getattr(family, "ENCODER", Encoder)(config, with_pooler)
    encoder.trained_backbone = trained_backbone
    if stream_weights == "file":
        sources = _leave_in_file(encoder, table, checkpoint, found)

        def write(linear: FrozenLinear, out: Tensor) -> None:
            _write(checkpoint, sources[linear], found, out)
            for name in sources[linear].names:
                checkpoint.let_go(found[name])

        kept = torch.bfloat16 if frozen_dtype == "bf16" else dtype
        encoder.stream = start_stream(FileBlocks([layout_of(layer, kept) for layer in encoder.layers], write), device)

    def value(name: str, shape: torch.Size) -> Tensor:
        return _assemble(checkpoint, table[name], found, shape, dtype, device)

    def copied(name: str) -> None:
        for source_name in table[name].names:
            checkpoint.let_go(found[source_name])

    fill(encoder, table, value, frozen_dtype, stream_weights, device, copied)
    return encoder, Origin(checkpoint.location, checkpoint.config, *fingerprints(checkpoint))


def random_encoder(config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                   frozen_dtype: str | None = None, stream_weights: str | None = None) -> tuple[Encoder, Origin]:
    """The encoder that a config.json describes with random weights, made on the device: for measurements at real size, and on
    fake tensors for a plan. Arguments and errors are load_encoder's; stream_weights is "host" or None."""
    check_placement(frozen_dtype, stream_weights)
    if stream_weights == "file":
        raise ConfigError("stream_weights 'file' needs a checkpoint's files, but random weights have none; use "
                          "stream_weights='host'.")
    encoder, (device, _) = empty_encoder(config), check_device(device, dtype)
    std = encoder.config.initializer_range

    def value(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("norm_weight"):
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std)

    fill(encoder, [name for name, _ in encoder.named_parameters()], value, frozen_dtype, stream_weights, device)
    return encoder, Origin("random weights", dict(config), "", "")


def check_placement(frozen_dtype: str | None, stream_weights: str | None) -> None:
    """Raises ConfigError for kinds of weights that do not exist or exclude each other."""
    if frozen_dtype not in (None, *FROZEN_DTYPES):
        raise ConfigError(f"frozen_dtype {frozen_dtype!r} does not exist; choose one of {', '.join(FROZEN_DTYPES)}, or leave it "
                          "out and set dtype.")
    if stream_weights not in (None, "host", "file"):
        raise ConfigError(f"stream_weights {stream_weights!r} does not exist; choose 'host' or 'file', or leave it out.")
    if stream_weights == "file" and frozen_dtype in KINDS:
        raise ConfigError(f"frozen_dtype {frozen_dtype!r} has to be encoded before it can be streamed, but stream_weights 'file' "
                          "reads the checkpoint's own weights each time; use stream_weights='host'.")


def check_device(device: str | torch.device, dtype: torch.dtype | str | None) -> tuple[torch.device, torch.dtype | None]:
    """Both as torch's own. Raises ConfigError for a device or a dtype that is not there, or a dtype that the device lacks."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} does not exist; use 'cpu', 'cuda' or 'cuda:1'.") from error
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in _COMPUTE_DTYPES or isinstance(dtype, str) and found is None:
        raise ConfigError(f"nothing is computed in dtype {dtype!r}; use 'bfloat16', 'float32' or 'float16', and frozen_dtype for "
                          "smaller weights.")
    dtype = found
    if device.type != "cuda":
        return device, dtype
    if not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r} is not there: torch sees no GPU; use device='cpu' (--use_cpu).")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {str(device)!r} is not there: torch sees {torch.cuda.device_count()} GPUs; use 'cuda:0' to "
                          f"'cuda:{torch.cuda.device_count() - 1}'.")
    major, minor = torch.cuda.get_device_capability(device)
    if dtype == torch.bfloat16 and major < 8:
        raise ConfigError(f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no bfloat16; use "
                          "dtype=torch.float16 or float32, or a card of capability 8.0.")
    return device, dtype


def _leave_in_file(encoder: Encoder, table: dict[str, Source], checkpoint: Checkpoint,
                   found: Mapping[str, str]) -> dict[FrozenLinear, Source]:
    """Take the layers' matrices out of the name map: where each comes from. Raises WeightError for one of another shape."""
    sources = {linear: table.pop(f"layers.{i}.{name}.weight") for i, layer in enumerate(encoder.layers)
               for name, linear in matrices(layer)}
    for linear, source in sources.items():
        part = torch.Size((linear.out_features // len(source.names), linear.in_features))
        for name in source.names if source.make is None else ():
            _check_shape(checkpoint, found[name], checkpoint.get(found[name]), part)
    return sources


def fill(encoder: Encoder, names: Iterable[str], value: Callable[[str, torch.Size], Tensor], frozen_dtype: str | None,
         stream_weights: str | None, device: torch.device, copied: Callable[[str], None] = lambda name: None) -> None:
    """Give the encoder's parameters their values, a layer after the other; encode and move away each layer's matrices before the
    next is read. copied(name) is told when the values that were read for a matrix are not needed any more."""
    by_layer: dict[int, list[str]] = {}
    for name in names:
        by_layer.setdefault(int(name.split(".")[1]) if name.startswith("layers.") else -1, []).append(name)
    host = HostBlocks(device if device.type == "cuda" else None) if stream_weights == "host" else None
    for index in sorted(by_layer):
        small = {f"layers.{index}.{name}.weight" for name, _ in matrices(encoder.layers[index])} if index >= 0 else set()
        for name in by_layer[index]:
            owner: Any
            owner, leaf = _owner(encoder, name)
            tensor = value(name, getattr(owner, leaf).shape)
            if name in small and frozen_dtype not in (None, _SHORT.get(tensor.dtype)):
                assert frozen_dtype is not None
                owner.hold(_encoded(tensor, frozen_dtype))
                copied(name)
            else:
                setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
            del tensor
        if host is not None and index >= 0:
            host.add(encoder.layers[index])
            for name in small:
                copied(name)
    if host is not None:
        encoder.stream = start_stream(host, device)
    encoder.frozen_dtype = frozen_dtype
    encoder.finish_loading()


_SHORT = {torch.bfloat16: "bf16"}


def _encoded(weight_OI: Tensor, frozen_dtype: str) -> Quantised:
    if frozen_dtype != "bf16":
        return quantise(weight_OI, frozen_dtype)
    return Quantised(PLAIN, weight_OI.bfloat16(), weight_OI.new_empty(0), (weight_OI.shape[0], weight_OI.shape[1]))


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
        checkpoint.let_go(names[short])
    return digest.hexdigest()
