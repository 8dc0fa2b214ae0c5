"""The shapes of prefix attention as one Hypothesis strategy: every option against every other.

CI draws a few of them, the same ones each time. Ten thousand new ones, for a night:

    python -m pytest --hypothesis-profile=night -k any_shape tests/kernels/test_prefix_attention_kernel.py
"""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from kernel_checks import Attention

# no token, a lone one, just over a 16-row tile, a whole tile of 64, a prime
EDGES = (0, 1, 17, 64, 127)


def examples(few: int) -> int:
    """How many to draw: the profile's number at night, else `few`."""
    return max(few, settings().max_examples) if settings().max_examples > 1000 else few


@st.composite
def cases(draw: st.DrawFn) -> Attention:
    """A batch of ragged rows with all their options. Packed ones have one prompt, no prefix dropout and see all their tokens."""
    packed, spare_rows = draw(st.booleans()), draw(st.sampled_from([0, 0, 1, 3, 70]))
    if packed:
        lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5, 16, 17, 33, 64]) | st.integers(0, 40), min_size=1, max_size=10))
        while 2 * (sum(lengths) + spare_rows) > 64 * len(lengths):         # no longer than 32 on average
            lengths.append(1)
        lengths += [] if any(lengths) else [3]
    else:
        lengths = draw(st.lists(st.sampled_from(EDGES) | st.integers(0, 40), min_size=1, max_size=3))
    P = draw(st.sampled_from([0, 1, 5, 16, 20, 33, 100]) | st.integers(0, 24))
    K = draw(st.sampled_from([1, 1, 3]))
    ids = prompt_lengths = None
    if P and K > 1:
        prompt_lengths = tuple(draw(st.lists(st.integers(0, P), min_size=K, max_size=K)))
        if not packed and draw(st.booleans()):
            ids = tuple(draw(st.lists(st.integers(0, K - 1), min_size=len(lengths), max_size=len(lengths))))
    rates = st.sampled_from([0.0, 0.0, 0.2, 0.5])
    return Attention(
        tuple(lengths), P, N=draw(st.sampled_from([1, 1, 1, 2])), D=draw(st.sampled_from([32, 32, 32, 64, 80, 96, 128])), K=K,
        prompt_ids=ids, prompt_lengths=prompt_lengths, dropout_p=draw(rates), prefix_dropout_p=0.0 if packed else draw(rates),
        dtype=draw(st.sampled_from([torch.float16] * 3 + [torch.float32])), spare_rows=spare_rows,
        keep_out=draw(st.booleans()), packed=packed,
        listed=not packed and draw(st.booleans()),
        seen=None if packed else draw(st.sampled_from([None, None, "causal", "candidates", "window"])))
