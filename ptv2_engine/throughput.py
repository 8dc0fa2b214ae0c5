"""What a run is told of its speed and memory: tokens a second, and the high-water mark of memory."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class CountsTokens(Protocol):
    tokens_seen: int


def peak_memory_bytes() -> int:
    """The high-water mark: of the GPU's allocator where there is one, else of this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Start the high-water mark again from what is held now (Linux: where /proc allows it)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)      # glibc keeps freed blocks: hand them back before counting anew
        Path("/proc/self/clear_refs").write_text("5")


class Throughput(TrainerCallback):
    """Adds tokens_per_second (since the last log) and peak_memory_mib to what is logged."""

    def __init__(self, trainer: CountsTokens) -> None:
        self.trainer, self.tokens, self.since = trainer, 0, time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.tokens, self.since = self.trainer.tokens_seen, time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_train_begin(args, state, control)            # an evaluation's time is not training's

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None,
               **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        now, tokens = time.perf_counter(), self.trainer.tokens_seen
        added = {"tokens_per_second": round((tokens - self.tokens) / (now - self.since), 1),
                 "peak_memory_mib": round(peak_memory_bytes() / 2**20, 1)}
        logs |= added
        state.log_history[-1] |= added
        self.tokens, self.since = tokens, now


def num_tokens(inputs: dict[str, Any]) -> int:
    """Real tokens of a batch, without reading anything back from a GPU when it is packed."""
    if "parts" in inputs:                                   # of several data sets
        return sum(map(num_tokens, inputs["parts"]))
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return ids.numel() if ids.dim() == 1 or mask is None else int(mask.sum())
