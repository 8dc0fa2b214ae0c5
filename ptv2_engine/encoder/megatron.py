"""GLM checkpoints as Megatron and DeepSpeed write them: one mp_rank_XX_model_states.pt for each model-parallel rank.

Each file is memory-mapped and its ["module"] is the state dict of one rank. Tensors that were split over the ranks are merged
one at a time when they are asked for (get), by the layout of ColumnParallelLinear and RowParallelLinear in mpu/layers.py of
https://github.com/THUDM/GLM, so memory stays at the mapped files plus one tensor. Optimizer state beside the weights is
never touched.

The files are pickles. They are read with weights_only; what lies beside the weights in them (random states, loss scalers)
becomes an empty stand-in, and any global that is not named here is refused.
"""

from __future__ import annotations

import re
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptv2_engine.encoder.glm_sizes import glm_config
from ptv2_engine.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from ptv2_engine.encoder.checkpoints import Checkpoint

FIRST_RANK = "mp_rank_00_model_states.pt"
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_TRACKERS = ("latest_checkpointed_iteration.txt", "latest")     # Megatron's, DeepSpeed's: the name of a folder beside them
_WORDS = "word_embeddings.weight"
_FIRST_QKV = "transformer.layers.0.attention.query_key_value.weight"
_POSITIONS, _BLOCKS = "transformer.position_embeddings.weight", "transformer.block_position_embeddings.weight"
_HEAD_DIM = 64                                                  # of every published GLM


class _Ignored:
    """Stands for an object that is no weight: takes any arguments and any state, and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS = (
    *(f"{numpy}.multiarray.{name}" for numpy in ("numpy.core", "numpy._core") for name in ("_reconstruct", "scalar")),
    "numpy.ndarray", "numpy.dtype",
    *(f"{package}.loss_scaler.{name}" for package in ("fp16", "deepspeed.runtime.fp16")
      for name in ("LossScaler", "DynamicLossScaler")),
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
)
_HARMLESS: list[Any] = [Namespace, *((_Ignored, name) for name in _STAND_INS)]
_one_at_a_time = threading.Lock()


@contextmanager
def _only_harmless_globals() -> Iterator[None]:
    """weights_only takes torch's own globals and _HARMLESS, whatever else this process has allowed; that is restored after."""
    with _one_at_a_time:
        allowed = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(_HARMLESS)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)


def _load(file: Path) -> dict[str, Any]:
    """The dictionary in a rank's file, its tensors memory-mapped. Raises CheckpointError."""
    try:
        with _only_harmless_globals():
            try:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                found = torch.load(file, map_location="cpu", weights_only=True)     # files older than torch 1.6
    except Exception as error:              # a damaged pickle can raise nearly anything
        raise CheckpointError(_reason(file, error)) from error
    if not isinstance(found, dict) or not isinstance(found.get("module"), dict):
        raise CheckpointError(f"{file} holds no dictionary called 'module', so it is no Megatron or DeepSpeed checkpoint of a "
                              "model; pass the folder of one.")
    return found


def _reason(file: Path, error: Exception) -> str:
    """The sentence that says why a file was not loaded."""
    if isinstance(error, OSError):
        return f"{file} cannot be read ({error.strerror or error}); check that it is there and that you may read it."
    refused = re.search(r"GLOBAL (\S+) w", str(error))
    if refused:
        return (f"{file} holds a pickled {refused[1][:100]}, and objects other than tensors and plain values are never run; "
                "where you trust the file, load it and save {'module': ...} alone with torch.save.")
    inner = re.search(r"WeightsUnpickler error: (.*)", str(error))
    reason = inner[1] if inner else next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{file} cannot be read and is probably truncated or corrupt ({file.stat().st_size} bytes: {reason}); copy it again."


def _rank_files(folder: Path) -> list[Path]:
    """The files of ranks 0, 1, ... in a folder; empty when there are none. Raises CheckpointError for a gap."""
    found = {int(match[1]): file for file in folder.iterdir() if (match := _RANK_FILE.fullmatch(file.name))}
    for rank in range(len(found)):
        if rank not in found:
            raise CheckpointError(f"{folder} holds {found[max(found)].name} but no mp_rank_{rank:02d}_model_states.pt; "
                                  "copy the files of all model-parallel ranks.")
    return [found[rank] for rank in range(len(found))]


def _find(folder: Path) -> list[Path]:
    """The rank files of a folder, or of the folder that its tracker file names."""
    if files := _rank_files(folder):
        return files
    for tracker in (folder / name for name in _TRACKERS):
        if tracker.is_file():
            tag = tracker.read_text(encoding="utf-8", errors="replace").strip()
            if tag not in {inside.name for inside in folder.iterdir() if inside.is_dir()}:
                raise CheckpointError(f"{tracker} names the folder {tag[:60]!r}, which is not beside it; copy that too, or "
                                      f"pass a folder that holds {FIRST_RANK}.")
            return _rank_files(folder / tag)
    return []


def _by_rows(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


def _by_columns(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1)


def _by_thirds(parts: list[Tensor]) -> Tensor:
    """[3 H/mp, ...] of each rank, its rows of q, then of k, then of v -> [3 H, ...] in the same order."""
    return torch.cat([part.unflatten(0, (3, -1)) for part in parts], dim=1).flatten(0, 1)


# how tensors with these endings were split; all others are the same on every rank
_MERGES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    _WORDS: _by_rows,
    "attention.query_key_value.weight": _by_thirds, "attention.query_key_value.bias": _by_thirds,
    "attention.dense.weight": _by_columns,
    "mlp.dense_h_to_4h.weight": _by_rows, "mlp.dense_h_to_4h.bias": _by_rows,
    "mlp.dense_4h_to_h.weight": _by_columns,
}


def _tensors(file: Path, module: dict[Any, Any]) -> dict[str, Tensor]:
    """A rank's state dict without what its wrappers put before the names."""
    tensors = {name: tensor for name, tensor in module.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    match = next(filter(None, (re.fullmatch(rf"((?:(?:model|module|glm)\.)*){re.escape(_WORDS)}", name) for name in tensors)),
                 None)
    if match is None:
        raise CheckpointError(f"{file} has no {_WORDS} in its 'module', so it is no GLM checkpoint; pass the folder of one.")
    return {name.removeprefix(match[1]): tensor for name, tensor in tensors.items()}


def _check_equal(files: list[Path], ranks: list[dict[str, Tensor]]) -> None:
    """Raises CheckpointError unless all ranks have the same names, shapes and dtypes."""
    first = ranks[0]
    for file, rank in zip(files[1:], ranks[1:], strict=True):
        if first.keys() != rank.keys():
            raise CheckpointError(f"{file} and {files[0].name} do not hold the same names ({min(first.keys() ^ rank.keys())} is "
                                  "only in one of them), so they are not from one checkpoint; copy them again.")
        for name, tensor in rank.items():
            mine = first[name]
            if (tensor.shape, tensor.dtype) != (mine.shape, mine.dtype):
                raise CheckpointError(f"{file} holds {name} as {tuple(tensor.shape)} {tensor.dtype}, but {files[0].name} as "
                                      f"{tuple(mine.shape)} {mine.dtype}; they are not from one checkpoint, copy them again.")


def _check_count(location: str, first: dict[str, Tensor], count: int) -> None:
    """Raises CheckpointError unless `count` ranks make up whole tensors, as far as the first rank's shapes tell."""
    for name, dims in ((_WORDS, 2), (_POSITIONS, 2), (_FIRST_QKV, 2)):
        if name not in first or first[name].dim() != dims:
            raise CheckpointError(f"{location} holds no matrix {name}, so it is no GLM checkpoint; pass the folder of one.")
    rows, whole = first[_FIRST_QKV].shape[0], 3 * first[_WORDS].shape[1]
    if rows * count == whole:
        return
    if rows and whole % rows == 0 and whole // rows > count:
        raise CheckpointError(f"{location} holds {count} of {whole // rows} model-parallel ranks; copy the files of all of them.")
    raise CheckpointError(f"{location}: {_FIRST_QKV} has {rows} rows on each of {count} ranks, but hidden_size "
                          f"{whole // 3} needs {whole} together; the files are not from one checkpoint.")


def _number_of_heads(location: str, hidden_size: int, args: dict[str, Any]) -> int:
    saved = args.get("num_attention_heads")
    if isinstance(saved, int) and saved > 0 and hidden_size % saved == 0:
        return saved
    if hidden_size % _HEAD_DIM:
        raise ConfigError(f"{location} does not say how many attention heads it has, and hidden_size {hidden_size} is no "
                          f"multiple of {_HEAD_DIM}; add 'args': argparse.Namespace(num_attention_heads=...) to {FIRST_RANK}.")
    return hidden_size // _HEAD_DIM


def _read_config(location: str, first: dict[str, Tensor], count: int, args: dict[str, Any]) -> dict[str, Any]:
    """The config dictionary that shapes and saved arguments imply. Raises ConfigError."""
    vocab_part, hidden_size = first[_WORDS].shape
    blocks = _BLOCKS in first
    layers = {match[1] for name in first if (match := re.match(r"transformer\.layers\.(\d+)\.", name))}
    saved = {name: args[name] for name in ("attention_scale", "layernorm_epsilon") if isinstance(args.get(name), (int, float))}
    return glm_config(
        num_layers=len(layers), hidden_size=hidden_size, num_attention_heads=_number_of_heads(location, hidden_size, args),
        vocab_size=vocab_part * count, max_sequence_length=first[_POSITIONS].shape[0] - blocks,
        block_position_encoding=blocks, **saved)


class MegatronCheckpoint:
    """The ranks of one checkpoint as one set of tensors (a Checkpoint)."""

    def __init__(self, location: str, files: list[Path]) -> None:
        loaded = [_load(file) for file in files]
        self._ranks = [_tensors(file, found["module"]) for file, found in zip(files, loaded, strict=True)]
        _check_equal(files, self._ranks)
        _check_count(location, self._ranks[0], len(files))
        args = next((vars(value) for value in loaded[0].values() if isinstance(value, Namespace)), {})
        self.location = location
        self.config: dict[str, Any] = _read_config(location, self._ranks[0], len(files), args)

    def names(self) -> Iterable[str]:
        return self._ranks[0]

    def get(self, name: str) -> Tensor:
        """The whole tensor: a new one where the ranks hold parts of it, else rank 0's, still in its file."""
        merge = next((merge for ending, merge in _MERGES.items() if name.endswith(ending)), None)
        if merge is None or len(self._ranks) == 1:
            return self._ranks[0][name].detach()
        return merge([rank[name].detach() for rank in self._ranks])

    def let_go(self, name: str) -> None:
        """Nothing: pages of these files are the system's to take back."""


def open_megatron(folder: str | Path) -> Checkpoint | None:
    """The GLM checkpoint in a folder of mp_rank_XX_model_states.pt files, or in the folder that its tracker file names.

    Returns None for a folder that holds neither, and for a path that is no folder. Nothing but names and shapes is read.
    Raises CheckpointError for a missing rank, ranks that do not fit together, a truncated file or a pickle that holds more
    than weights and plain values; ConfigError where the number of heads cannot be told.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        return None
    files = _find(folder)
    return MegatronCheckpoint(str(folder), files) if files else None
