"""A training step as CUDA graphs: hundreds of short kernels that a graph launches at once, and the host one by one.

Three graphs make a step. `gradients` (one a bucket of batch sizes) holds forward, loss and backward, and adds to gradients that
stay where they are; `clip` and `step` (one each) hold gradient clipping and AdamW. So accumulation, callbacks between them and a
batch that no graph fits all see the gradients they would see without graphs.

Kernels get their sizes when a graph is captured, so a batch is filled up to its bucket: tokens of no sequence behind the last
one (less than 1/8 of the tokens, computed and read by nobody), sequences without tokens up to the number that a batch may have,
and the longest sequence rounded up to the power of two by which the kernels choose their tiles. What changes from step to step
lies in device memory at fixed places: the batch, the dropout seed, the learning rates. Batches run on the same filled-up sizes
before their graph exists and when they have none, so the numbers do not depend on which of the two a step was.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ptv2_engine.graph_inputs import Bucket, Staging, bucket_of, fill_up, places_of, views_of
from ptv2_engine.model import PromptedModel

Replay = Callable[[], None]


@functools.cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """One for all captures on a device: cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream(device)


def recorded(function: Callable[[], Any], pool: Any) -> tuple[Replay, Any]:
    """The replay of a CUDA graph, and what the function returned: tensors that a replay writes anew. Nothing runs yet.

    Raises RuntimeError with the cause where the function cannot be captured; the process goes on as before then. torch's own
    context leaves a failed capture half open: its stream current, its pool receiving allocations, the generator believing in it.
    """
    device, graph = torch.cuda.current_device(), torch.cuda.CUDAGraph()
    try:
        # thread_local: a thread that pins the next batch may call what a captured thread may not
        with (torch.cuda.stream(torch.cuda.current_stream()),
              torch.cuda.graph(graph, pool=pool, stream=capture_stream(device), capture_error_mode="thread_local")):
            result = function()
    except Exception as error:
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
        generator: Any = torch.cuda.default_generators[device]
        with contextlib.suppress(RuntimeError, AttributeError):
            generator.graphsafe_set_state(generator.clone_state())
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        raise RuntimeError(str(cause)) from error
    return graph.replay, result


class CudaGraphs:
    """Captures functions into CUDA graphs that share one pool of memory, as they never run at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Any]) -> tuple[Replay, Any]:
        return recorded(function, self.pool)


class _Part:
    """A part of the step: a function that runs as it is until its graph is captured, right behind a run (what a run makes once,
    compiled kernels and tables, is there then), and is replayed from then on."""

    def __init__(self, owner: StepGraphs, function: Callable[[], Any]) -> None:
        self.owner, self.function, self.captured = owner, function, False
        self.replay: Replay = lambda: None
        self.result: Tensor | None = None                     # written anew by each replay

    def run(self, capture: bool = True, probe: bool = False) -> Any:
        """Its result. capture: whether it may be captured now. probe: whether it may be run twice to see if it can be."""
        if self.captured:
            self.replay()
            return None if self.result is None else self.result.clone()
        if not capture or self.owner.failed is not None:
            return self.function()
        result = self.owner.probed(self.function) if probe else self.function()
        if (made := self.owner.capture(self.function)) is not None:
            self.replay, self.result = made
            self.captured = True
        return result


class _Gradients:
    """Forward, loss and backward of one bucket."""

    def __init__(self, owner: StepGraphs, bucket: Bucket) -> None:
        self.owner, self.bucket, self.runs = owner, bucket, 0
        self.memory = torch.empty(places_of(bucket)[-1], dtype=torch.uint8, device=owner.device)
        self.inputs = views_of(bucket, self.memory) | dict(bucket.others)
        self.part = _Part(owner, self.compute)

    def compute(self) -> Tensor:
        """Add a batch's gradients to the model's; its loss."""
        inputs = dict(self.inputs)
        divisor = inputs.pop("divisor")
        loss = self.owner.model(**inputs).loss / divisor
        found = torch.autograd.grad(loss, self.owner.parameters, allow_unused=True)
        pairs = [(total, new) for total, new in zip(self.owner.gradients, found, strict=True) if new is not None]
        torch._foreach_add_([total for total, _ in pairs], [new for _, new in pairs])
        return loss.detach()

    def run(self, values: Mapping[str, Any]) -> Tensor:
        self.owner.staging.upload(values, self.bucket, self.memory)
        self.runs += 1                                        # sizes that come once are not worth a capture
        return self.part.run(capture=self.runs > 1 and self.owner.has_room(), probe=True)


class StepGraphs:
    """The steps of a model and its optimizer, captured as they come.

    Arguments:
        model: PromptedModel on the device, in training mode when it runs. optimizer: AdamW over its trained parameters.
        max_norm: of the gradients; 0 leaves them. examples: the most a batch has; smaller ones (an epoch's last) are filled up
        with spare ones, so that they share graphs. 0: each number of sequences has graphs of its own.
        graphs: what captures, default CudaGraphs. most: graphs that may be held; buckets beyond run without.
    """

    def __init__(self, model: PromptedModel, optimizer: AdamW, max_norm: float, *, examples: int = 0, graphs: Any = None,
                 most: int = 64) -> None:
        self.model, self.optimizer, self.max_norm, self.device = model, optimizer, max_norm, model.device
        self.examples, self.most = examples, most
        self.graphs: Any = CudaGraphs() if graphs is None else graphs
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.rates = [torch.zeros((), device=self.device) for _ in optimizer.param_groups]
        self.rates_held: list[float | None] = [None] * len(self.rates)
        self.numbers_held: list[Any] = []                     # what the captured update holds beside the rates
        self.empty = True                                     # whether the gradients are zero
        self.staging = Staging(self.device)
        self.buckets: dict[Any, _Gradients] = {}
        self._clip = _Part(self, lambda: nn.utils.clip_grad_norm_(self.parameters, self.max_norm))
        self._update: _Part | None = None
        self.failed: str | None = None                        # why nothing more is captured
        if isinstance(optimizer, GraphedAdamW):
            optimizer.graphs = self

    def release(self) -> None:
        """Forget the graphs and give their memory back; the optimizer is on its own again."""
        if isinstance(self.optimizer, GraphedAdamW):
            self.optimizer.graphs = None
        self.buckets.clear()
        self._update = self.graphs = None
        self._clip = _Part(self, self._clip.function)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)               # the last replay may still run
            torch.cuda.empty_cache()

    def probed(self, function: Callable[[], Tensor]) -> Tensor:
        """Run a function that is to be captured; what waits for the device is noticed here, where no capture breaks off."""
        if self.device.type != "cuda":
            return function()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            self.failed = f"a step waits for the device ({str(error).splitlines()[0]})"
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return function()

    def capture(self, function: Callable[[], Any]) -> Any:
        """(replay, result), or None where the function cannot be captured; then self.failed says why."""
        if self.failed is not None:
            return None
        try:
            return self.graphs.capture(function)
        except RuntimeError as error:
            self.failed = f"a step cannot be captured ({str(error).splitlines()[0]})"
            return None

    def add_gradients(self, inputs: Mapping[str, Any], *, num_items: Tensor | int | None = None, divisor: float = 1.0) -> Tensor:
        """Forward and backward of a packed batch on the host; the gradients are in .grad then, added to what was there.

        num_items: the model's num_items_in_batch. divisor: of the loss, as transformers divides where num_items is None.
        Returns:
            The loss, a scalar on the device.
        """
        per_token = self.model.task == "token-classification"
        values = fill_up(inputs, self.model.max_length(), per_token, self.examples) | {"divisor": divisor}
        values["seed"] = torch.randint(2**62, (1,))           # as the model draws it
        if num_items is not None:
            values["num_items_in_batch"] = torch.as_tensor(num_items, dtype=torch.float32)
        bucket = bucket_of(values)
        key = (bucket, self._settings())
        step = self.buckets.get(key)
        if step is None:
            step = _Gradients(self, bucket)
            if len(self.buckets) < 4 * self.most:             # most of them see one batch, and are small
                self.buckets[key] = step
        self.attach()
        self.empty = False
        return step.run(values)

    def _settings(self) -> tuple[Any, ...]:
        """What a captured step holds as numbers, so that a step with others is captured anew."""
        encoder = self.model.encoder
        own = (value for value in vars(self.model.head).values() if isinstance(value, float))
        return (encoder.training, encoder.memory, encoder.hidden_dropout, encoder.attention_dropout,
                self.model.prompt_config.prompt_dropout, *own)

    def attach(self) -> None:
        """Let .grad be where the graphs add, and where a step without graphs adds too; what it holds elsewhere is taken over."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not gradient:
                if parameter.grad is not None:
                    gradient.copy_(parameter.grad)
                elif not self.empty:                          # zero_grad() without a step
                    gradient.zero_()
                parameter.grad = gradient

    def has_room(self) -> bool:
        return sum(step.part.captured for step in self.buckets.values()) < self.most

    def clip(self) -> Tensor:
        """Clip the gradients to max_norm; their norm before that, a scalar on the device."""
        self.attach()
        return self._clip.run()

    def step(self, update: Callable[[], Any]) -> None:
        """AdamW's update (optimizer.step as it is without graphs) with the rates its groups hold now; then zero gradients."""
        def function() -> None:
            with self._rates_on_device():
                update()
            torch._foreach_zero_(self.gradients)

        self.attach()
        for i, group in enumerate(self.optimizer.param_groups):
            if self.rates_held[i] != group["lr"]:
                self.rates[i].fill_(group["lr"])
                self.rates_held[i] = group["lr"]
        self.empty = True
        numbers = [(group["betas"], group["eps"], group["weight_decay"]) for group in self.optimizer.param_groups]
        if self._update is None or numbers != self.numbers_held:
            self._update, self.numbers_held = _Part(self, function), numbers
        self._update.run()

    @contextlib.contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """The optimizer reads its rates from the device inside; schedules, logs and checkpoints see numbers as ever."""
        groups = self.optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"], group["capturable"] = rate, True
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(groups, before, strict=True):
                group["lr"], group["capturable"] = rate, capturable


class GraphedAdamW(AdamW):
    """torch's fused AdamW; with graphs, its step is theirs. State and checkpoints are AdamW's."""

    graphs: StepGraphs | None = None

    def step(self, closure: Any = None) -> Any:
        if self.graphs is None or closure is not None:
            return super().step(closure)
        return self.graphs.step(super().step)


def unsupported(model: Any, device: torch.device) -> str | None:
    """Why a model's steps cannot be captured on the device, or None."""
    if device.type != "cuda":
        return f"training runs on {device.type}"
    if not isinstance(model, PromptedModel):
        return f"{type(model).__name__} runs code that is not the engine's"
    if model.encoder.trained_backbone is not None:
        return "the backbone trains, in plain PyTorch"
    if model.encoder.stream is not None:
        return "the weights are streamed, by copies that a graph would freeze"
    if model.prompt_config.method == "shallow" and model.prompt_config.prompt_lengths is not None:
        return "input prompts of different lengths make batches whose size is read back"
    return None
