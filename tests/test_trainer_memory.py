"""The Trainer's promises about memory: planned first, cut into micro-batches that change no result, redone where it runs out."""

from __future__ import annotations

import pytest
import torch
import transformers

from ptv2_engine import PromptConfig, PromptedModel, Trainer, trainer_memory
from ptv2_engine.batches import PackedCollator, split_inputs
from ptv2_engine.errors import ConfigError, OutOfMemory
from ptv2_engine.memory import plan
from ptv2_engine.testing import tiny_model


def model_of(task="sequence-classification", **placement):
    torch.manual_seed(0)
    return PromptedModel.from_pretrained(tiny_model(), task=task, num_labels=3, prompt=PromptConfig(4, prompt_dropout=0.0),
                                         head_dropout=0.0, **placement)


def data(count=24, task="sequence-classification"):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        ids = torch.randint(5, 120, (int(torch.randint(3, 20, (1,), generator=generator)),), generator=generator).tolist()
        rows.append({"input_ids": ids, "label": i % 3 if task == "sequence-classification" else [j % 3 for j in range(len(ids))]})
    return rows


def trainer_of(tmp_path, model, task="sequence-classification", batch=8, steps=3, **options):
    model.set_hidden_dropout(0.0)
    model.encoder.attention_dropout = 0.0
    args = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=batch, max_steps=steps, report_to="none",
                                          save_strategy=options.pop("save_strategy", "no"), use_cpu=True,
                                          save_steps=options.pop("save_steps", 500), disable_tqdm=True, learning_rate=1e-2,
                                          dataloader_drop_last=options.pop("dataloader_drop_last", False),
                                          gradient_accumulation_steps=options.pop("accumulation", 1),
                                          gradient_checkpointing=options.pop("gradient_checkpointing", False))
    return Trainer(model, args, train_dataset=data(task=task), **options)


def trained(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.trained_parameters().values()])


def test_pieces_of_a_packed_batch_are_the_batch():
    batch = PackedCollator()(data(5, "token-classification"))
    batch["position_ids"] = torch.stack((batch["input_ids"], batch["input_ids"]))
    for pieces in (1, 2, 3, 5, 9):
        parts = split_inputs(batch, pieces)
        assert len(parts) == min(pieces, 5) and all(p["max_seqlen"] == batch["max_seqlen"] for p in parts)
        for name, dim in (("input_ids", 0), ("seq_lengths", 0), ("labels", 0), ("position_ids", 1)):
            assert torch.equal(torch.cat([p[name] for p in parts], dim), batch[name])
        assert all(int(p["seq_lengths"].sum()) == p["input_ids"].shape[0] for p in parts)
    padded = {"input_ids": torch.ones(5, 7), "attention_mask": torch.ones(5, 7), "labels": torch.arange(5)}
    assert torch.equal(torch.cat([p["labels"] for p in split_inputs(padded, 2)]), padded["labels"])


class Limited:
    """Forward passes of more than `tokens` fail as an allocator does, some after the head's gradient has been accumulated."""

    def __init__(self, model, tokens, in_backward):
        self.model, self.tokens, self.in_backward, self.failed = model, tokens, in_backward, 0
        self.forward, model.forward = model.forward, self

    def __call__(self, input_ids, **inputs):
        too_many = input_ids.numel() > self.tokens
        if too_many and not self.in_backward:
            self.failed += 1
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")
        out = self.forward(input_ids, **inputs)
        if too_many:
            self.failed += 1
            out.loss = out.loss + _Fails.apply(self.model.prompt.bank).sum() * 0
        return out


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_that_runs_out_of_memory_is_redone_and_changes_nothing(tmp_path, task, in_backward, accumulation):
    plain, limited = model_of(task), model_of(task)
    trainer_of(tmp_path / "a", plain, task, accumulation=accumulation).train()
    watch = Limited(limited, 40, in_backward)
    trainer = trainer_of(tmp_path / "b", limited, task, accumulation=accumulation)
    trainer.train()
    assert watch.failed >= 1 and trainer.pieces >= 2
    torch.testing.assert_close(trained(limited), trained(plain), rtol=1e-4, atol=1e-5)
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_one_sequence_that_does_not_fit_says_so(tmp_path):
    model = model_of()
    Limited(model, 1, False)
    with pytest.raises(OutOfMemory, match="not even one sequence fits into memory at step 1 .*--memory minimal"):
        trainer_of(tmp_path, model).train()


def test_other_errors_are_not_swallowed(tmp_path):
    model = model_of()

    def forward(input_ids, labels, **_):
        raise RuntimeError("something else")

    model.forward = forward
    with pytest.raises(RuntimeError, match="something else"):
        trainer_of(tmp_path, model).train()


def test_what_does_not_fit_is_refused_before_training(tmp_path, monkeypatch):
    """The sentence says what would fit, and nothing was trained."""
    model = model_of()
    before = trained(model).clone()
    peak = plan(trainer_memory.setup_of(model, [19] * 8, torch.device("cpu"))).peak
    monkeypatch.setattr(trainer_memory, "available", lambda *_: int(peak * 0.75))
    with pytest.raises(OutOfMemory, match=r"a step of 8 sequences \([\d,]+ tokens\) takes .* use .*--"):
        trainer_of(tmp_path, model).train()
    assert torch.equal(trained(model), before)
    trainer_of(tmp_path, model, plan_memory=False).train()
    assert not torch.equal(trained(model), before)


def test_auto_batch_keeps_the_batch(tmp_path, monkeypatch):
    """Micro-batches of 2 in place of one batch of 8: the same examples in each optimizer step, and the same prompt."""
    plain, automatic = model_of(), model_of()
    trainer_of(tmp_path / "a", plain, batch=8).train()
    longest = sorted((len(row["input_ids"]) for row in data()), reverse=True)[:2]
    limit = plan(trainer_memory.setup_of(automatic, longest, torch.device("cpu"), accumulates=True)).peak
    monkeypatch.setattr(trainer_memory, "available", lambda *_: limit)
    trainer = trainer_of(tmp_path / "b", automatic, batch=8, auto_batch=True)
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (2, 4)
    trainer.train()
    assert trainer.pieces == 1 and trainer.state.global_step == 3
    torch.testing.assert_close(trained(automatic), trained(plain), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(trainer_memory, "available", lambda *_: 1000)
    with pytest.raises(OutOfMemory, match="not even one example of 17 tokens fits, but 0.0 MiB are free .* use a smaller model"):
        trainer_of(tmp_path / "c", automatic, batch=8, auto_batch=True)
    with pytest.raises(ConfigError, match="per_device_train_batch_size 0 is below 1"):
        trainer_of(tmp_path / "d", automatic, batch=0, auto_batch=True)
    monkeypatch.setattr(trainer_memory, "available", lambda *_: 2**50)
    large = trainer_of(tmp_path / "e", automatic, batch=10**6, auto_batch=True)          # more than there are examples
    assert large.args.gradient_accumulation_steps == 1


def test_auto_batch_needs_lengths(tmp_path):
    with pytest.raises(ConfigError, match="auto_batch needs to know the examples' lengths"):
        trainer_of(tmp_path, model_of(), auto_batch=True, data_collator=transformers.default_data_collator)


def test_a_resumed_run_draws_what_an_unbroken_one_does_where_memory_runs_out(tmp_path):
    """Dropout is on; how steps are cut is saved, and what a failed attempt drew is taken back."""
    def run(resume=None):
        model = model_of()
        watch = Limited(model, 40, False)
        trainer = trainer_of(tmp_path, model, steps=4, save_strategy="steps", save_steps=2)
        model.set_hidden_dropout(0.1)
        trainer.train(resume_from_checkpoint=resume)
        assert bool(watch.failed) == (resume is None)
        return trained(model)

    unbroken = run()
    assert torch.equal(run(str(tmp_path / "checkpoint-2")), unbroken)


def test_gradient_checkpointing_is_memory_minimal(tmp_path):
    """transformers' switch works, and the prefix is trained (checkpointing wrappers elsewhere lose its gradient)."""
    plain, checkpointed = model_of(), model_of()
    trainer_of(tmp_path / "a", plain).train()
    trainer_of(tmp_path / "b", checkpointed, gradient_checkpointing=True).train()
    assert checkpointed.encoder.memory == "minimal"
    torch.testing.assert_close(trained(checkpointed), trained(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", [{"memory": "lean"}, {"frozen_dtype": "int8"}, {"stream_weights": "host"},
                                       {"stream_weights": "host", "frozen_dtype": "nf4", "memory": "minimal"}], ids=str)
def test_placements_train_save_and_load(tmp_path, placement):
    from ptv2_engine.testing import padded_batch

    source = tmp_path / "backbone"
    tiny_model().save_pretrained(source)
    torch.manual_seed(0)
    model = PromptedModel.from_pretrained(source, num_labels=3, prompt=PromptConfig(4), **placement)
    before = trained(model).clone()
    trainer_of(tmp_path / "run", model).train()
    assert not torch.equal(trained(model), before)
    model.save_pretrained(tmp_path / "adapter")
    placement.pop("frozen_dtype", None)                 # the adapter knows
    again = PromptedModel.from_adapter(tmp_path / "adapter", **placement)
    assert again.encoder.frozen_dtype == model.encoder.frozen_dtype and again.encoder.memory == placement.get("memory", "exact")
    batch = padded_batch([4, 9])
    torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits)


def test_a_model_that_lean_does_not_take_is_refused_with_what_it_takes(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = PromptedModel.from_pretrained(tiny_model(intermediate_size=130), num_labels=3, prompt=PromptConfig(4))
    monkeypatch.setattr(trainer_memory, "available", lambda *_: 1000)
    with pytest.raises(OutOfMemory, match="takes .* by plan, but .* use a smaller model"):
        trainer_of(tmp_path, model)


def test_a_data_set_smaller_than_its_batch_and_drop_last(tmp_path):
    trainer_of(tmp_path, model_of(), batch=64, dataloader_drop_last=True)               # nothing to plan, and no error


def test_errors_that_say_out_of_memory():
    for words in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "Triton Error [CUDA]: out of memory",
                  "CUDA error: out of memory"):
        assert trainer_memory.is_out_of_memory(RuntimeError(words))
    assert not trainer_memory.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not trainer_memory.is_out_of_memory(ValueError("out of memory"))


def test_free_host_memory_knows_a_containers_limit(tmp_path):
    (tmp_path / "proc").mkdir()
    assert trainer_memory.free_host_bytes(tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    assert trainer_memory.free_host_bytes(tmp_path) == 1024000
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("500000\n")
    assert trainer_memory.free_host_bytes(tmp_path) == 1024000
    (group / "memory.max").write_text("800000\n")
    (group / "memory.stat").write_text("anon 400000\ninactive_file 50000\n")
    assert trainer_memory.free_host_bytes(tmp_path) == 350000


def test_fp16_autocast_is_refused(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    args.fp16 = True
    with pytest.raises(ConfigError, match="fp16=True asks for autocast .* use bf16=True"):
        Trainer(model_of(), args)


def test_streamed_weights_are_not_cast(tmp_path):
    source = tmp_path / "backbone"
    tiny_model().save_pretrained(source)
    model = PromptedModel.from_pretrained(source, num_labels=3, stream_weights="host")
    with pytest.raises(ConfigError, match="load the model with dtype=torch.bfloat16"):
        model.set_backbone_dtype(torch.bfloat16)
