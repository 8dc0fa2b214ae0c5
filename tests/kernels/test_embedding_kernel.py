"""The embedding and dropout kernels against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_dropout, check_embedding


@pytest.mark.parametrize("T, E", [(0, 32), (1, 128), (9, 100), (33, 64)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_embedding(T, E, p):
    check_embedding(T, E, torch.float32, p)


@pytest.mark.parametrize("types", ["given", "none", "no table"])
@pytest.mark.parametrize("positions", [True, False])
def test_tables_that_may_be_missing(types, positions):
    check_embedding(5, 48, torch.float16, 0.1, types, positions)


@pytest.mark.parametrize("T, H", [(0, 32), (1, 4), (9, 100), (33, 600)])
def test_dropout(T, H):
    check_dropout(T, H)
    check_dropout(T, H, torch.float16, 0.5)
