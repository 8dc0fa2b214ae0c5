"""A live progress bar for training: epoch, loss, tokens a second, peak memory, the last evaluation."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LiveProgress(TrainerCallback):
    """Draws on a terminal; elsewhere (a log file) it prints one line an evaluation."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title, self.console = title, console or Console()
        self.bar: Progress | None = None
        self.fields: dict[str, Any] = {"loss": "-", "speed": "-", "memory": "-", "score": ""}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = Progress(
            TextColumn(f"{self.title:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn(
                "loss {task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[memory]} MiB  {task.fields[score]}"
            ),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, **self.fields)
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None,
               **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.fields |= {"loss": f"{logs['loss']:.4f}", "speed": f"{logs.get('tokens_per_second', 0):,.0f}",
                            "memory": f"{logs.get('peak_memory_mib', 0):,.0f}"}
        scores = {k.removeprefix("eval_"): v for k, v in logs.items()
                  if k.startswith("eval_") and not k.endswith(("runtime", "per_second"))}
        if scores:
            self.fields["score"] = " ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "loss")
            line = f"{self.title}: epoch {logs.get('epoch', 0):.0f}  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
            if not self.console.is_terminal and self.fields["loss"] != "-":         # nothing was logged yet on a short run
                line += f"  (train loss {self.fields['loss']}, {self.fields['speed']} tokens/s, {self.fields['memory']} MiB)"
            self.console.print(line, highlight=False, soft_wrap=True)
        if self.bar is not None:
            self.bar.update(self.task, **self.fields)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


def show_progress(trainer: Trainer, title: str, console: Console | None = None) -> None:
    """Replace transformers' printed dictionaries by the bar."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LiveProgress(title, console))
