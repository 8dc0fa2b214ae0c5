"""Padded <-> packed, the collator, and batches of equal token counts."""

from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st

from ptv2_engine.batches import PackedCollator, TokenBalancedBatchSampler
from ptv2_engine.errors import DataError, InputError
from ptv2_engine.packing import IGNORE, from_packed, pack, unpack

masks = st.integers(1, 5).flatmap(lambda B: st.integers(1, 9).flatmap(
    lambda S: st.lists(st.lists(st.sampled_from([0, 1]), min_size=S, max_size=S), min_size=B, max_size=B)))


@given(masks)
def test_pack_then_unpack_gives_the_tokens_back(mask):
    mask = torch.tensor(mask)
    ids = torch.arange(1, mask.numel() + 1).view(mask.shape)
    batch = pack(ids, mask)
    assert batch.num_tokens == int(mask.sum()) and batch.max_seqlen == int(mask.sum(1).max())
    assert batch.cu_seqlens.dtype == torch.int32 and batch.lengths().tolist() == mask.sum(1).tolist()
    assert torch.equal(unpack(batch.input_ids_T[:, None].double(), batch)[..., 0], (ids * mask).double())
    assert torch.equal(batch.position_ids_T, torch.arange(mask.shape[1]).expand_as(mask)[mask.bool()])


@given(masks, st.booleans(), st.integers(0, 2**31))
def test_num_positions_is_the_first_row_no_token_takes(mask, counts_pads, seed):
    mask = torch.tensor(mask)
    ids = torch.randint(0, 4, mask.shape, generator=torch.Generator().manual_seed(seed))
    batch = pack(ids, mask, uncounted_id=None if counts_pads else 1)
    assert batch.num_positions == max(batch.position_ids_T.tolist(), default=-1) + 1
    assert batch.max_seqlen == int(mask.sum(1).max())


@given(masks)
def test_positions_that_count_tokens_follow_transformers_roberta(mask):
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    mask = torch.tensor(mask)
    ids = torch.where(mask.bool(), 7, 1)
    expected = RobertaEmbeddings.create_position_ids_from_input_ids(ids, 1)
    batch = pack(ids, mask, uncounted_id=1)
    assert torch.equal(batch.position_ids_T + 2, expected[mask.bool()])


def test_a_token_that_carries_the_pad_id_is_marked():
    batch = pack(torch.tensor([[5, 1, 6]]), torch.ones(1, 3), uncounted_id=1)
    assert batch.position_ids_T.tolist() == [0, -1, 1]
    assert from_packed(torch.tensor([5, 1, 6, 9]), torch.tensor([3, 1]), uncounted_id=1).position_ids_T.tolist() == [0, -1, 1, 0]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_packed_input_equals_packing_the_padded_one(lengths):
    T, S = sum(lengths), max(lengths)
    ids = torch.arange(1, T + 1)
    one = from_packed(ids, torch.tensor(lengths))
    mask = torch.arange(max(S, 1))[None] < torch.tensor(lengths)[:, None]
    padded = torch.zeros(len(lengths), max(S, 1), dtype=torch.long)
    padded[mask] = ids
    two = pack(padded, mask)
    for name in ("input_ids_T", "position_ids_T", "cu_seqlens"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert torch.equal(one.sequence_of_token(), two.sequence_of_token())


def test_unpack_passes_gradients():
    batch = pack(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    x = torch.randn(3, 4, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: unpack(x, batch), (x,))


@pytest.mark.parametrize("arguments, words", [
    ((torch.rand(2, 3),), r"input_ids is \(2, 3\) float32, but integer ids of shape \[batch, sequence\]"),
    ((torch.ones(3, dtype=torch.long),), r"input_ids is \(3,\) int64"),
    ((torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4)), r"attention_mask is \(2, 4\), but input_ids is \(2, 3\)"),
    ((torch.ones(2, 3, dtype=torch.long), None, torch.ones(2, 2, dtype=torch.long)), "token_type_ids"),
    ((torch.ones(2, 3, dtype=torch.long), None, torch.ones(2, 3)), r"token_type_ids is \(2, 3\) float32, but integer ids"),
    ((torch.ones(2, 3, dtype=torch.long), None, None, torch.ones(2)), r"prompt_ids is \(2,\) float32, but integer ids"),
    ((torch.ones(2, 3, dtype=torch.bool),), r"input_ids is \(2, 3\) bool"),
])
def test_bad_inputs(arguments, words):
    with pytest.raises(InputError, match=words):
        pack(*arguments)


def test_lengths_that_do_not_add_up():
    with pytest.raises(InputError, match="seq_lengths add up to 4, but there are 5 packed tokens"):
        from_packed(torch.ones(5, dtype=torch.long), torch.tensor([1, 3]))
    with pytest.raises(InputError, match="seq_lengths holds -1, but a length is 0 or more"):
        from_packed(torch.ones(5, dtype=torch.long), torch.tensor([6, -1]))
    with pytest.raises(InputError, match="max_seqlen is 2, but a sequence has 4 tokens"):
        from_packed(torch.ones(5, dtype=torch.long), torch.tensor([4, 1]), max_seqlen=2)
    with pytest.raises(InputError, match="one id for each of 2 sequences"):
        from_packed(torch.ones(4, dtype=torch.long), torch.tensor([1, 3]), prompt_ids=torch.tensor([0]))


FEATURES = [{"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1], "labels": [1, 2, IGNORE]},
            {"input_ids": [8], "token_type_ids": [0], "labels": [0]}]


def test_collator_packs_and_pads_token_labels():
    batch = PackedCollator()(FEATURES)
    assert list(batch)[0] == "seq_lengths" and batch["seq_lengths"].tolist() == [3, 1]
    assert batch["input_ids"].tolist() == [5, 6, 7, 8] and batch["token_type_ids"].tolist() == [0, 0, 1, 0]
    assert batch["labels"].tolist() == [[1, 2, IGNORE], [0, IGNORE, IGNORE]] and batch["max_seqlen"] == 3


def test_collator_checks_what_a_gpu_step_will_not():
    with pytest.raises(InputError, match="token id 8 is outside the vocabulary of 8"):
        PackedCollator(vocab_size=8)(FEATURES)
    with pytest.raises(InputError, match="an example has 3 tokens, but the model takes 2"):
        PackedCollator(max_length=2)(FEATURES)


@given(st.lists(st.integers(1, 60), max_size=120), st.integers(1, 9), st.booleans())
def test_sampler_visits_each_example_once_in_full_batches(lengths, batch_size, drop_last):
    sampler = TokenBalancedBatchSampler(lengths, batch_size, drop_last=drop_last, mega=3)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    seen = [i for b in batches for i in b]
    assert len(set(seen)) == len(seen) and len(seen) >= len(lengths) - (batch_size - 1 if drop_last else 0)
    assert all(len(b) == batch_size for b in batches[:-1])


def test_sampler_evens_out_tokens_and_follows_the_epoch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 200, (512,), generator=generator).tolist()
    sampler = TokenBalancedBatchSampler(lengths, 16, seed=1)
    first = list(sampler)
    totals = [sum(lengths[i] for i in b) for b in first]
    plain = [sum(lengths[i:i + 16]) for i in range(0, 512, 16)]
    assert max(totals) - min(totals) < 0.2 * (max(plain) - min(plain))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_two_processes_share_an_epoch_and_get_a_new_order_in_the_next():
    from accelerate.data_loader import BatchSamplerShard

    sampler = TokenBalancedBatchSampler(list(range(1, 65)), 8, seed=2)
    shards = [BatchSamplerShard(sampler, num_processes=2, process_index=i) for i in range(2)]
    first = [list(shard) for shard in shards]
    assert sorted(i for batches in first for b in batches for i in b) == list(range(64))
    shards[0].batch_sampler.sampler.set_epoch(1)
    assert [list(shard) for shard in shards] != first


def test_sampler_needs_a_batch_size():
    lengths = [1, 2]
    with pytest.raises(DataError, match="batch size 0"):
        TokenBalancedBatchSampler(lengths, 0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=70), st.sampled_from([(8, 1), (8, 2), (8, 4), (8, 8), (6, 3)]),
       st.booleans(), st.booleans())
def test_micro_batches_are_the_batch_cut_up(lengths, sizes, shuffle, drop_last):
    """Whatever the number of pieces: the same batches, cut into micro-batches of at most batch_size / pieces examples."""
    batch_size, pieces = sizes
    whole = TokenBalancedBatchSampler(lengths, batch_size, shuffle=shuffle, seed=3, drop_last=drop_last)
    cut = TokenBalancedBatchSampler(lengths, batch_size, shuffle=shuffle, seed=3, drop_last=drop_last, pieces=pieces)
    batches, micro = list(whole), list(cut)
    assert (len(batches), len(micro)) == (len(whole), len(cut))
    assert all(0 < len(m) <= batch_size // pieces for m in micro)
    for batch in batches:
        count = -(-len(batch) * pieces // batch_size)
        parts, micro = micro[:count], micro[count:]
        assert sorted(i for part in parts for i in part) == sorted(batch)
    assert not micro
    for processes in (2, 3):            # accelerate deals micro-batches out to processes, and pads the last round
        shards = [list(BatchSamplerShard(cut, processes, rank)) for rank in range(processes)]
        assert len({len(shard) for shard in shards}) == 1
        seen, given = {i for shard in shards for batch in shard for i in batch}, {i for batch in cut for i in batch}
        assert seen <= given and (drop_last or seen == given)               # drop_last drops an incomplete round too


def test_the_padding_of_transformers_own_scripts_is_cut():
    """run_glue.py and run_qa.py pad to max_length: padding must be no token, no label, and no part of the balance."""
    from ptv2_engine.batches import PackedCollator
    from ptv2_engine.trainer import _sequences

    rows = [{"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "token_type_ids": [0, 1, 1, 0, 0],
             "labels": [1, 2, 1, -100, -100]}, {"input_ids": [8, 9, 0, 0, 0], "attention_mask": [1, 1, 0, 0, 0],
                                                "token_type_ids": [0] * 5, "labels": [0, 1, -100, -100, -100]}]
    names = ("input_ids", "token_type_ids", "labels")
    plain = [{name: row[name][:n] for name in names} for row, n in zip(rows, (3, 2), strict=True)]
    ours, expected = PackedCollator()(rows), PackedCollator()(plain)
    assert set(ours) == set(expected)
    assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(expected[name])) for name in expected)
    choices = [{"input_ids": [[5, 6, 0], [7, 0, 0]], "attention_mask": [[1, 1, 0], [1, 0, 0]], "labels": 1}]
    assert PackedCollator()(choices)["input_ids"].tolist() == [5, 6, 7]
    assert _sequences(rows) == [[3], [2]] and _sequences(choices) == [[2, 1]]
    datasets = pytest.importorskip("datasets")
    assert _sequences(datasets.Dataset.from_list(rows)) == [[3], [2]]
    with pytest.raises(InputError, match="padding on the right"):
        PackedCollator()([{"input_ids": [0, 5], "attention_mask": [0, 1], "labels": 0}])
