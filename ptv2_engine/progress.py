"""A live progress bar for training: epoch, loss, tokens a second, peak memory, the last evaluation."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy


class LiveProgress(TrainerCallback):
    """Draws on a terminal; elsewhere (a log file) it prints one line an evaluation."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title, self.console = title, console or Console()
        self.bar: Progress | None = None
        self.fields: dict[str, Any] = {"loss": "-", "speed": "-", "memory": "-", "score": ""}
        self.logged = self.steps = 0               # the last step whose loss was logged; steps since the last evaluation,
        self.loss, self.evaluated = 0.0, False     # and the sum of their losses

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
        self.logged = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _log_before_evaluation(args, control)
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _log_before_evaluation(args, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None,
               **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:                         # the mean over the steps since it was logged last
            if self.evaluated:
                self.loss, self.steps, self.evaluated = 0.0, 0, False
            steps, self.logged = state.global_step - self.logged, state.global_step
            self.loss, self.steps = self.loss + logs["loss"] * steps, self.steps + steps
            self.fields |= {"loss": f"{logs['loss']:.4f}", "speed": f"{logs.get('tokens_per_second', 0):,.0f}",
                            "memory": f"{logs.get('peak_memory_mib', 0):,.0f}"}
        scores = {k.removeprefix("eval_"): v for k, v in logs.items()
                  if k.startswith("eval_") and not k.endswith(("runtime", "per_second"))}
        if scores:
            self.fields["score"] = " ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "loss")
            self.evaluated = True
            line = f"{self.title}: epoch {logs.get('epoch', 0):.4g}  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
            if not self.console.is_terminal and self.steps:
                line += (f"  (train loss {self.loss / self.steps:.4f}, {self.fields['speed']} tokens/s, "
                         f"{self.fields['memory']} MiB)")
            self.console.print(line, highlight=False, soft_wrap=True)
        if self.bar is not None:
            self.bar.update(self.task, **self.fields)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


def _log_before_evaluation(args: TrainingArguments, control: TrainerControl) -> None:
    """An evaluation's line says the training loss, also of a run that is shorter than logging_steps."""
    if control.should_evaluate and args.logging_strategy != IntervalStrategy.NO:
        control.should_log = True


def show_progress(trainer: Trainer, title: str, console: Console | None = None) -> None:
    """Replace transformers' printed dictionaries by the bar."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LiveProgress(title, console))
