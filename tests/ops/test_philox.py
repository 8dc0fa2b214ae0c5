"""The reference generator against an independent scalar implementation, and the statistics of its masks."""

from __future__ import annotations

import torch

from ptv2_engine.ops import _philox


def philox_scalar(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Straight from the paper's pseudo code, with Python's big integers."""
    c, k = list(counter), list(key)
    for r in range(rounds):
        if r:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
    return c


def test_scalar_implementation_gives_the_published_vectors():
    # Random123's known-answer file, philox4x32 with 7 and 10 rounds
    assert philox_scalar([0] * 4, [0] * 2, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_scalar([0] * 4, [0] * 2, 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_words_equal_the_scalar_implementation():
    seed = (0xDEADBEEF << 32) | 0x12345678
    c0, c1 = torch.arange(7), torch.tensor([3, 2**31 + 5])
    words = _philox.philox_words(c0, c1[:, None], torch.tensor(9), 8 * 5 + 3, seed)
    for i, row in enumerate(c1.tolist()):
        for j in range(7):
            assert words[i, j].tolist() == philox_scalar([j, row, 9, 43], [0x12345678, 0xDEADBEEF], 7)


def test_keep_scale_drops_the_right_share_and_depends_on_every_coordinate():
    rows = torch.arange(400)
    draw = {"p": 0.3, "seed": 11, "site": 4}
    keep = _philox.keep_scale(rows, 250, 6, stream=_philox.TOKEN_PROB, **draw)
    assert keep.shape == (400, 250)
    share = float((keep == 0).double().mean())
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / keep.numel()) ** 0.5
    assert torch.allclose(keep.max(), torch.tensor(1 / 0.7, dtype=torch.float64))
    for other in (_philox.keep_scale(rows, 250, 7, stream=_philox.TOKEN_PROB, **draw),
                  _philox.keep_scale(rows, 250, 6, stream=_philox.PREFIX_PROB, **draw),
                  _philox.keep_scale(rows, 250, 6, stream=_philox.TOKEN_PROB, **draw | {"seed": 12}),
                  _philox.keep_scale(rows, 250, 6, stream=_philox.TOKEN_PROB, **draw | {"site": 5})):
        agreement = float((keep == other).double().mean())
        assert abs(agreement - (0.3**2 + 0.7**2)) < 0.01


def test_seed_tensor_is_drawn_from_torchs_generator():
    torch.manual_seed(3)
    first = _philox.seed_tensor(None, torch.device("cpu"), True)
    torch.manual_seed(3)
    assert torch.equal(first, _philox.seed_tensor(None, torch.device("cpu"), True))
    assert _philox.seed_tensor(7, torch.device("cpu"), False) is None
