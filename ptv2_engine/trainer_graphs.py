"""The part of the Trainer that replays steps as CUDA graphs (graphed.py), and knows when not to."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ptv2_engine.graphed import GraphedAdamW, StepGraphs, unsupported
from ptv2_engine.throughput import num_tokens
from ptv2_engine.trainer_memory import Budget, is_out_of_memory

_log = logging.getLogger("ptv2_engine")


class GraphedTrainer(transformers.Trainer):
    """transformers' loop around StepGraphs: its training step, its clipping and its optimizer's step are their replays."""

    packs: bool                                    # whether batches are PackedCollator's
    tokens_seen: int
    budget: Budget | None = None                   # what the largest batch was planned with
    graphs: StepGraphs | None = None               # made at the first step
    graphs_refused: str | None = "not settled"     # why there are none, or None

    def knows_lengths(self, dataset: Any) -> bool:
        """Whether batches of a data set are ours to make: it can be counted, and PackedCollator packs it."""
        return self.packs and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")

    def settle_graphs(self, wanted: bool) -> None:
        """Decide once, when everything else is known; where a GPU goes without, the log says why."""
        self.graphs_refused = self._refuses_graphs() if wanted else "cuda_graphs is off"
        if self.graphs_refused is not None and self.args.device.type == "cuda":
            _log.info("steps run without CUDA graphs: %s", self.graphs_refused)

    def _refuses_graphs(self) -> str | None:
        args = self.args
        if args.n_gpu > 1 or self.accelerator.num_processes > 1:
            return f"gradients are reduced over {max(args.n_gpu, self.accelerator.num_processes)} devices"
        if args.optim != "adamw_torch_fused" or self.optimizer is not None:
            name = "your own" if self.optimizer is not None else str(getattr(args.optim, "value", args.optim))
            return f"the optimizer is {name}; adamw_torch_fused has graphs"
        if not self.knows_lengths(self.train_dataset):
            return "batches come from a collator or a stream of your own"
        if args.label_smoothing_factor or self.compute_loss_func is not None:
            return "the loss is computed outside of the model"
        if (reason := unsupported(self.model, args.device)) is not None or self.budget is None:
            return reason
        return self.budget.graphs_do_not_fit()

    def graphed_optimizer(self, cls: Any) -> Any:
        return GraphedAdamW if cls is torch.optim.AdamW and self.graphs_refused is None else cls

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self.drop_graphs()

    def drop_graphs(self, reason: str | None = None) -> None:
        """Give the graphs' memory back; with a reason, for good. Gradients added so far stay in .grad."""
        if self.graphs is not None:
            self.graphs.release()
            self.graphs = None
        if reason is not None:
            self.graphs_refused = reason
            _log.warning("steps run without CUDA graphs from here on: %s", reason)

    def graphed_step(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor | None:
        """The loss of a training step through its graphs. None: to be done without; nothing was added to the gradients then."""
        if self.graphs is not None and self.graphs.failed is not None:
            self.drop_graphs(self.graphs.failed)
        if self.graphs_refused is None and inputs.get("target_ids") is not None:
            self.drop_graphs("the candidates' tokens are found by reading the batch back")
        if self.graphs_refused is not None:
            return None
        if self.graphs is None:
            optimizer: Any = self.optimizer
            self.graphs = StepGraphs(self.accelerator.unwrap_model(model), getattr(optimizer, "optimizer", optimizer),
                                     self.args.max_grad_norm, examples=self.args.train_batch_size)
        if not model.training:                                # else it would visit every module of every step
            model.train()
        try:
            loss = self.graphs.add_gradients(inputs, num_items=num_items,
                                             divisor=self.current_gradient_accumulation_steps if num_items is None else 1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.drop_graphs("memory ran out beside what the graphs hold")
            return None
        self.tokens_seen += num_tokens(inputs)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(model) if self.graphs is None else self.graphs.clip()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """On the host where graphs run, which take it from there with the batch: no step waits for the copy."""
        return super()._get_num_items_in_batch(batch_samples, device if self.graphs_refused is not None else torch.device("cpu"))
