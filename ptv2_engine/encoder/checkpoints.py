"""Where weights come from: safetensors, pytorch_model.bin, a hub id, or a transformers model in memory.

A checkpoint hands out one tensor at a time. safetensors and zip-format .bin files are memory-mapped, so tensors that are
used in the file's own dtype on the CPU stay backed by the file: pages that are never touched again after packing cost no
memory. The file must stay in place (replacing it by rename is safe, truncating it is not).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ptv2_engine.encoder.glm_sizes import SIZES
from ptv2_engine.encoder.megatron import open_megatron
from ptv2_engine.errors import CheckpointError, ConfigError, WeightError

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"


class Checkpoint(Protocol):
    """A named set of tensors beside a transformers config dictionary."""

    location: str
    config: dict[str, Any]

    def names(self) -> Iterable[str]: ...

    def get(self, name: str) -> Tensor: ...

    def let_go(self, name: str) -> None:
        """The values are not needed for now: give the memory back that reading them took."""


class SafetensorsFiles:
    """One or several .safetensors files, memory-mapped."""

    def __init__(self, location: str, config: dict[str, Any], files: list[Path]) -> None:
        self.location, self.config = location, config
        self._where: dict[str, Any] = {}
        for file in files:
            handle = open_safetensors(file)
            self._where |= {name: handle for name in handle.keys()}  # noqa: SIM118  (safe_open is not a mapping)

    def names(self) -> Iterable[str]:
        return self._where

    def get(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def let_go(self, name: str) -> None:
        drop_pages(self.get(name))


class TensorDictionary:
    """Tensors that are (lazily) in memory already: an unpickled .bin file or a model's state dict."""

    def __init__(self, location: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.location, self.config, self._tensors = location, config, tensors

    def names(self) -> Iterable[str]:
        return self._tensors

    def get(self, name: str) -> Tensor:
        return self._tensors[name]

    def let_go(self, name: str) -> None:
        pass


def drop_pages(tensor: Tensor) -> None:
    """Let go of the memory behind a tensor of a memory-mapped file; it is read again when it is looked at. Linux."""
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page                 # whole pages: the first and the last may hold neighbours
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def open_safetensors(file: Path) -> Any:
    """safe_open(file), or CheckpointError saying what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        with open(file, "rb") as raw:
            start = raw.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise CheckpointError(f"{file} is a pickle, not safetensors, and is not loaded under that name; rename it to "
                                  f"{BIN} if you trust it (it is then read with weights_only).") from error
        raise CheckpointError(f"{file} is corrupt or truncated ({file.stat().st_size} bytes: {error}); "
                              "download or save it again.") from error


def load_bin(file: Path) -> dict[str, Tensor]:
    """torch.load with weights_only: tensors only, no code of the file is run. CheckpointError when that is refused."""
    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            found = torch.load(file, map_location="cpu", weights_only=True)     # files older than torch 1.6
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} is corrupt, or holds pickled objects beside tensors, which are never run; "
                              f"save it again as safetensors ({_first_line(error)}).") from error
    if not isinstance(found, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items()):
        raise CheckpointError(f"{file} holds {type(found).__name__} data that is not a plain dictionary of tensors; "
                              "save the model's state_dict() and nothing else.")
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:                                                 # no JSON, or not UTF-8
        raise CheckpointError(f"{file} is not valid JSON ({_first_line(error)}); download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, not a JSON object; download it again.")
    return found


def _merge(files: list[Path]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for file in files:
        merged |= load_bin(file)
    return merged


def _locate(source: str, filename: str) -> Path | None:
    """A file of a local folder or hub repository, or None when it is not there."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / filename if (folder / filename).is_file() else None
    if source.startswith(("/", "./", "../", "~")):           # no hub id, whose rules would be the only complaint
        raise WeightError(f"the folder {source!r} does not exist; check the path, or pass a hub id.")
    from huggingface_hub import constants
    from transformers.utils import cached_file

    try:
        found = cached_file(source, filename, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise WeightError(f"{source!r} is neither a local folder nor a hub repository that can be reached "
                          f"({_first_line(error)}); check the spelling or pass a folder.") from error
    if found is None and filename == "config.json" and constants.HF_HUB_OFFLINE:
        raise WeightError(f"{source!r} is no folder, and the hub's cache on this machine has no config.json of it; without "
                          "HF_HUB_OFFLINE the hub is asked too.")
    return None if found is None else Path(found)


def _files(source: str, filename: str) -> list[Path] | None:
    """The file, or all shards its index names."""
    if (single := _locate(source, filename)) is not None:
        return [single]
    if (index := _locate(source, f"{filename}.index.json")) is None:
        return None
    shards = []
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map; download it again.")
    for name in sorted(set(map(str, weight_map.values()))):
        shard = _locate(source, name)
        if shard is None:
            raise WeightError(f"{source} has {index.name} but not its shard {name}; download it again.")
        shards.append(shard)
    return shards


def model_config(source: str | Path | nn.Module) -> dict[str, Any]:
    """The config dictionary alone: of a hub id, a folder, a model in memory, or a published GLM by name ("glm-10b").

    Raises ConfigError, WeightError or CheckpointError.
    """
    if isinstance(source, nn.Module):
        return open_checkpoint(source).config
    name = str(source).rpartition("/")[2].lower()
    if name in SIZES and not Path(source).exists():
        return dict(SIZES[name])
    if (megatron := open_megatron(source)) is not None:
        return megatron.config
    config_file = _locate(str(source), "config.json")
    if config_file is None:
        raise ConfigError(f"{str(source)!r} has no config.json; pass a folder or hub id of a transformers checkpoint, or a "
                          f"published GLM by name ({', '.join(SIZES)}).")
    return _read_json(config_file)


def open_checkpoint(source: str | Path | nn.Module) -> Checkpoint:
    """Open a hub id, a local folder, or a transformers model in memory. Nothing but headers is read yet.

    Raises ConfigError, WeightError or CheckpointError.
    """
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        if config is None or not hasattr(config, "to_dict"):
            raise ConfigError(f"a {type(source).__name__} has no transformers config; pass a transformers model or a folder.")
        location = getattr(config, "_name_or_path", "") or "a model in memory"
        return TensorDictionary(location, config.to_dict(), source.state_dict())
    source = str(source)
    if (megatron := open_megatron(source)) is not None:
        return megatron
    config_file = _locate(source, "config.json")
    if config_file is None:
        raise ConfigError(f"{source!r} has no config.json; pass a folder or hub id of a transformers checkpoint.")
    config = _read_json(config_file)
    if (files := _files(source, SAFETENSORS)) is not None:
        return SafetensorsFiles(source, config, files)
    if (files := _files(source, BIN)) is not None:
        return TensorDictionary(source, config, _merge(files))
    raise WeightError(f"{source!r} holds neither {SAFETENSORS} nor {BIN} (nor an index of shards); pass a folder that does.")
