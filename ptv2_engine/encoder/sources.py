"""Where a parameter's values come from in a checkpoint: a family's name map is a table of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor


class Source(NamedTuple):
    """Tensors of the checkpoint, and how they become one parameter; None: concatenated along dim 0."""

    names: tuple[str, ...]
    make: Callable[[list[Tensor]], Tensor] | None = None


NameMap = Mapping[str, Source]
ZEROS = Source(())                 # a parameter that the architecture leaves out: zeros


def one(name: str) -> Source:
    """The tensor itself."""
    return Source((name,))


def concatenated(*names: str) -> Source:
    """Tensors of equal shape, one after the other along dim 0."""
    return Source(names)
