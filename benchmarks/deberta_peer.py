"""transformers' own DeBERTa with a P-Tuning v2 prefix patched into its attention: what a user can put together today.

PEFT's prefix tuning refuses DeBERTa (it takes no past_key_values), so this does what the published P-Tuning v2 code does: the
prefix is expanded over the batch and concatenated, its relative scores are columns of zeros, everything else is the stock
module's code, padded. Only the prefix and the head require grad, so autograd computes no weight gradient here either.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import moved, same_loss, stepper
from ptv2_engine import PromptedModel


def _attention_v1(self: nn.Module, hidden_states: Tensor, attention_mask: Tensor, output_attentions: bool = False,
                  query_states: Tensor | None = None, relative_pos: Tensor | None = None,
                  rel_embeddings: Tensor | None = None) -> tuple[Tensor, None]:
    q, k, v = self.transpose_for_scores(self.in_proj(hidden_states)).chunk(3, dim=-1)
    q = (q + self.transpose_for_scores(self.q_bias[None, None, :])) / (q.shape[-1] * (1 + len(self.pos_att_type)))**0.5
    v = v + self.transpose_for_scores(self.v_bias[None, None, :])
    relative = self.disentangled_att_bias(q, k, relative_pos, self.pos_dropout(rel_embeddings), 1 + len(self.pos_att_type))
    return _finish(self, q, k, v, relative, attention_mask)


def _attention_v2(self: nn.Module, hidden_states: Tensor, attention_mask: Tensor, output_attentions: bool = False,
                  query_states: Tensor | None = None, relative_pos: Tensor | None = None,
                  rel_embeddings: Tensor | None = None) -> tuple[Tensor, None]:
    B, N, factor = hidden_states.shape[0], self.num_attention_heads, 1 + len(self.pos_att_type)
    q, k, v = (self.transpose_for_scores(proj(hidden_states), N) for proj in (self.query_proj, self.key_proj, self.value_proj))
    relative = self.disentangled_attention_bias(q, k, relative_pos, self.pos_dropout(rel_embeddings), factor)
    q, k, v, relative = (x.view(B, N, *x.shape[1:]) for x in (q, k, v, relative))
    return _finish(self, q / (q.shape[-1] * factor)**0.5, k, v, relative, attention_mask)


def _finish(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, relative: Tensor, attention_mask: Tensor) -> tuple[Tensor, None]:
    pk, pv = (p.transpose(0, 1).expand(q.shape[0], -1, -1, -1) for p in self.prefix)              # [B, N, P, D]
    P = pk.shape[2]
    scores = q @ torch.cat((pk, k), 2).transpose(-1, -2) + F.pad(relative, (P, 0))
    allowed = F.pad(attention_mask.bool(), (P, 0), value=True)
    probs = self.dropout(scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1))
    o = probs @ torch.cat((pv, v), 2)
    return o.permute(0, 2, 1, 3).flatten(2), None


class PatchedDeberta(nn.Module):
    """A transformers DeBERTa ForSequenceClassification with a trainable prefix [L, 2, P, N, D], pooler and classifier."""

    def __init__(self, model: nn.Module, prompt_length: int) -> None:
        super().__init__()
        c = model.config
        self.model = model.requires_grad_(False)
        model.pooler.requires_grad_(True)
        model.classifier.requires_grad_(True)
        N = c.num_attention_heads
        self.prefix = nn.Parameter(torch.empty(c.num_hidden_layers, 2, prompt_length, N, c.hidden_size // N).normal_(0, 0.02))
        self.prefix_dropout = nn.Dropout(c.hidden_dropout_prob)
        forward = _attention_v1 if c.model_type == "deberta" else _attention_v2
        for layer in model.deberta.encoder.layer:
            layer.attention.self.forward = types.MethodType(forward, layer.attention.self)

    def forward(self, **inputs: Tensor) -> object:
        for layer, prefix in zip(self.model.deberta.encoder.layer, self.prefix_dropout(self.prefix).unbind(0), strict=True):
            layer.attention.self.prefix = prefix
        return self.model(**inputs)

    def take_trained(self, ours: PromptedModel) -> None:
        """The prompt and the head of one of our models."""
        c = ours.encoder.config
        with torch.no_grad():
            rows = ours.prompt.bank[0].view(-1, c.num_layers, 2, c.num_heads, c.head_dim)
            self.prefix.copy_(rows.permute(1, 2, 0, 3, 4))
            for mine, theirs in ((ours.head.dense, self.model.pooler.dense), (ours.head.classifier, self.model.classifier)):
                theirs.load_state_dict(mine.state_dict())

    def train_in_fp32(self) -> PatchedDeberta:
        """What trains in fp32, as ours has it, whatever the frozen weights are in."""
        for p in self.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
        return self


def patched_step(base: nn.Module, ours: PromptedModel, packed: dict[str, Any], padded: dict[str, Any]) -> Callable[[], None]:
    """A training step of the patched model in bf16, frozen weights and autocast. base: the transformers model that ours has its
    weights of. Raises AssertionError where the two losses differ."""
    packed, padded = (moved(batch, str(ours.device)) for batch in (packed, padded))
    peer = PatchedDeberta(copy.deepcopy(base), ours.prompt_config.prompt_length).to(ours.device).train_in_fp32()
    peer.take_trained(ours)
    with torch.no_grad(), torch.autocast(ours.device.type, torch.bfloat16):
        losses = [float(model.eval()(**batch).loss) for model, batch in ((ours, packed), (peer, padded))]
    ours.train()
    peer.train()
    same_loss(*losses, 2e-2)
    trained = [p for p in peer.parameters() if p.requires_grad]
    return stepper(peer, trained, torch.optim.AdamW(trained, 1e-3, fused=True), padded, True)
