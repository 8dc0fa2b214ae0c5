"""Four prompts of different length, trained in one batch over one backbone: python examples/many_prompts.py BACKBONE"""

from __future__ import annotations

import sys

import torch

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.optim import adamw


def main(backbone: object, steps: int = 3) -> list[float]:
    """Each prompt sees its own sequences only; returns the losses."""
    torch.manual_seed(0)
    prompt = PromptConfig(prompt_length=12, num_prompts=4, prompt_lengths=[12, 8, 4, 1])
    model = PromptedModel.from_pretrained(backbone, num_labels=2, prompt=prompt).train()  # type: ignore[arg-type]
    optimizer = adamw(model, 1e-2)
    ids = torch.randint(5, 100, (8, 10))
    which = torch.arange(8) % 4
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, prompt_ids=which, labels=torch.arange(8) // 4).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main(sys.argv[1]))
