"""The benchmarks' machinery: peers compute what ours does, turns are taken, rows become tables, and nothing is typed by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.attention import flex_attention

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import attention_peers, bench_scaling, gpu_check, measure, models, report, shapes
from benchmarks.attention_peers import Attention, flex_packed, ours, sdpa_padded
from benchmarks.bench_disentangled_attention import Case, fused, stock
from benchmarks.contest import InputSet, check, contest
from benchmarks.flex_encoder import FlexEncoder
from ptv2_engine import cli, cli_bench, timing
from ptv2_engine.testing import tiny_config

ROOT = Path(__file__).parent.parent
CASES = [Attention([5, 9, 3], 4, 2, 16, torch.float32, "cpu"), Attention([6, 6], 3, 2, 16, torch.float32, "cpu"),
         Attention([7, 2], 0, 2, 16, torch.float32, "cpu"), Attention([7, 2], 2, 2, 16, torch.float32, "cpu")]


def fake_varlen(q, k, v, cu_q, cu_k, s_q, s_k):
    """What torch's varlen_attn computes on a GPU, sequence by sequence."""
    outs = []
    for i in range(len(cu_q) - 1):
        one = [x[cu[i]:cu[i + 1]].transpose(0, 1) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k))]
        outs.append(torch.nn.functional.scaled_dot_product_attention(*one).transpose(0, 1))
    return torch.cat(outs)


def dense_flex(q, k, v, block_mask):
    """FlexAttention with its mask written out: torch's own has no backward on the CPU."""
    queries, keys = (torch.arange(x.shape[2]) for x in (q, k))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, block_mask.mask_mod(0, 0, queries[:, None], keys[None]))


def agree(peer: InputSet, truth: InputSet, backward: bool = True) -> None:
    check(peer.results(backward), truth.results(backward))


@pytest.mark.parametrize("case", CASES)
def test_peers_compute_what_ours_does(case, monkeypatch):
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen)
    truth = ours(case, 0)
    assert len(truth.results(True)) == (6 if case.P else 4)
    agree(sdpa_padded(case, 0), truth)
    agree(attention_peers.varlen_gathered(case, 0), truth)
    with monkeypatch.context() as patch:                     # torch's own forward
        patch.setattr(attention_peers, "leaves_of", lambda *tensors: list(tensors))
        agree(flex_packed(case, 0, compiled=False), truth, False)
    monkeypatch.setattr(flex_attention, "flex_attention", dense_flex)
    agree(flex_packed(case, 0, compiled=False), truth)


@pytest.mark.parametrize("lengths, P", [([5, 9, 3], 4), ([300, 7], 0)])
def test_the_stock_design_computes_what_disentangled_attention_does(lengths, P):
    case = Case(lengths, P, 2, 16, torch.float32, "cpu")
    agree(stock(case, 0), fused(case, 0))


@pytest.mark.parametrize("place", range(6))
def test_a_peer_that_computes_something_else_is_no_peer(place):
    truth = ours(CASES[0], 0).results(True)
    wrong = [x.clone() for x in truth]
    wrong[place][-1] *= 1.01
    with pytest.raises(AssertionError, match=f"gradient {place} of 5 is" if place else "the output is"):
        check(wrong, truth)
    with pytest.raises(AssertionError, match="3 gradients where ours has 5"):
        check(truth[:4], truth)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_contest_times_those_that_agree_and_says_why_not_the_others(direction):
    def contestant(function):
        def build(seed):
            x = torch.full((4,), seed + 1.0, requires_grad=True)
            return InputSet(lambda: function(x), [x], torch.ones(4))
        return build

    def without_grad(x):                                     # runs while it is compared, and not as a forward is timed
        return x / [][0] if not torch.is_grad_enabled() else x * 2

    rows = []
    contestants = {name: contestant(function) for name, function in {
        "ours": lambda x: x * 2, "same": lambda x: x + x, "other": lambda x: x * 3, "floor": lambda x: x,
        "broken": lambda x: x.no_such_thing(), "timed": without_grad}.items()}
    contest(lambda case, functions, **facts: rows.append((functions, facts)), "case", contestants, direction, "cpu", 1 << 30,
            unchecked=("floor", "timed"), op="add_norm")
    functions, facts = rows[0]
    assert facts["op"] == "add_norm" and facts["pass"] == direction and facts["input_sets"] == 2 == len(functions["ours"])
    expected = {"ours", "same", "floor"} | ({"timed"} if direction != "forward" else set())
    assert set(functions) == expected
    assert facts["skipped"]["other"].startswith("computes something else: the output is")
    assert facts["skipped"]["broken"].startswith("AttributeError: ")
    found = [function() for function in functions["same"]]
    if direction == "forward":
        assert [float(x[0]) for x in found] == [2, 4] and not found[0].requires_grad       # the sets take turns
    else:
        assert all(float(g[0]) == 2 for g, in found)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_flex_encoder_computes_our_loss(family, monkeypatch):
    model = models.our_model(tiny_config(family).to_dict(), 4, torch.float32, "cpu").eval()
    packed, _ = models.batch_of([7, 12, 3], 1010)
    packed["input_ids"] %= 100
    peer = FlexEncoder(model, packed, compiled=False).eval()
    expected = model(**packed).loss
    with torch.no_grad():
        torch.testing.assert_close(peer(), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(flex_attention, "flex_attention", dense_flex)
    torch.testing.assert_close(peer(), expected, rtol=1e-5, atol=1e-6)
    both = ((peer(), peer.bank), (expected, model.prompt.bank))
    torch.testing.assert_close(*(torch.autograd.grad(loss, bank)[0].flatten() for loss, bank in both), rtol=1e-4, atol=1e-6)


def test_turns_are_taken_call_by_call_and_input_sets_go_round():
    order = []
    times, eager = timing.side_by_side({"a": [lambda: order.append("a0"), lambda: order.append("a1")],
                                         "b": lambda: order.append("b")}, "cpu", rounds=2, warmup=0)
    assert order[:3] == ["a0", "a1", "b"]                    # each once before any timing; then A/A's own first calls
    assert order[5:] == ["a0", "b", "a0", "a1", "b", "a1"] and not eager
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "A/A": 2}
    assert timing.input_sets(1 << 20, "cpu") * (1 << 20) >= min(2 * timing.cache_bytes("cpu"), 16 << 20)
    assert timing.input_sets(1 << 40, "cpu") == 2


def test_a_peer_that_fails_is_a_reason():
    made, skipped = measure.attempt({"good": lambda: 1, "bad": lambda: torch.zeros(2) @ torch.zeros(3)})
    assert made == {"good": 1} and skipped["bad"].startswith("RuntimeError: ")


def test_the_fitted_line():
    assert bench_scaling.fitted([1, 2, 3], [5, 7, 9]) == pytest.approx((2, 3, 1))


def test_where_the_cases_of_a_grid_run():
    half, single = torch.bfloat16, torch.float32
    cases = {where: [(p.values[1:], "gpu" in str(p.marks), "full" in str(p.marks)) for p in shapes.on_cpu_and_gpu(("a", where))]
             for where in ("cpu gpu", "gpu", "full", "cpu full")}
    assert cases["cpu gpu"] == [(("cpu", single), False, False), (("cpu", half), False, False), (("cuda", half), True, False)]
    assert cases["gpu"] == [(("cuda", half), True, False)]
    assert cases["full"] == [(("cpu", single), False, True), (("cuda", half), True, True)]
    assert cases["cpu full"] == [(("cpu", single), False, True), (("cpu", half), False, True)]


def test_lengths():
    assert sum(shapes.lengths_of("128", tokens=16384)) == 16384
    assert 15_500 < sum(shapes.lengths_of("rte", tokens=16384)) <= 16384
    assert len(shapes.lengths_of("rte", 16)) == 16 and shapes.lengths_of("7", 3) == [7, 7, 7]
    assert sum(shapes.lengths_of("squad", tokens=200_000)) > 190_000               # more than there are: once again
    mnli = shapes.LENGTHS["mnli"]
    assert abs(sum(mnli) / len(mnli) - 39) < 1


@pytest.mark.parametrize("name", ["MiniLM", "BERT-large", "RoBERTa-large", "DeBERTa-xlarge", "GLM-2B", "GLM-10B"])
def test_configs_have_the_published_shapes(name):
    from ptv2_engine.encoder.weights import empty_encoder

    config = empty_encoder(models.config_of(name)).config
    shape = shapes.SHAPES[name if name != "RoBERTa-large" else "BERT-large"]
    assert (config.hidden_size, config.num_heads, config.ffn_size) == shape


def row(case, seconds=1.0, **facts):
    times = {"ptv2": {"median_s": seconds, "p20_s": seconds, "p80_s": seconds, "times_ours": 1.0},
             "peer": {"median_s": 2 * seconds, "p20_s": 2, "p80_s": 2, "times_ours": 2.0},
             "A/A": {"median_s": seconds, "p20_s": 1, "p80_s": 1, "times_ours": 1.01}}
    return {"case": case, "device": "cpu", "times": times} | facts


def record(date, commit, rows, **facts):
    made = {"device": "box", "date": date, "commit": commit, "versions": {"torch": "2"}, "command": "pytest", "rows": rows}
    return made | facts


LIMITS = {"cpu": {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 1e11}}}


def test_the_table_shows_rates_reasons_and_the_same_function_twice():
    rows = [row("prefix_attention forward  X", op="prefix_attention", of_limit=0.5, limited_by="bytes",
                skipped={"flex": "Oops: no"}),
            row("train step  X", op="train_step", tokens=1000, tokens_per_s=500.0, batch=10),
            row("scaling", op="scaling", model="M", axis="tokens",
                values=[1, 2], milliseconds=[1.0, 2.0], slope=1.0, unit="ms", r2=1.0)]
    text = report.table(record("2026-01-01", "abc", rows, limits=LIMITS))
    assert "50% of bytes | peer 2.00x, flex: not run (Oops) | 1.01 |" in text
    assert "500 tokens/s, 5.0 sequences/s" in text and "copy 10 GB/s" in text and "| tokens | 1, 2 | 1.0, 2.0 | 1 ms |" in text


def test_the_newest_row_of_a_case_wins_and_pictures_are_drawn(tmp_path):
    folder = tmp_path / "results" / "box"
    folder.mkdir(parents=True)
    facts = {"op": "prefix_attention", "dtype": "fp32", "bytes": 1e9, "flops": 1e10}
    for name, made in (("2026-01-01-a", record("2026-01-01", "a", [row("one", 1.0), row("two", 3.0)])),
                       ("2026-01-02-b", record("2026-01-02", "b", [row("one", 5.0, **facts)], limits=LIMITS))):
        (folder / f"{name}.json").write_text(json.dumps(made))
    docs = tmp_path / "performance.md"
    docs.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    text = report.docs_text(tmp_path / "results", docs, tmp_path)
    assert "| one | 5.00 s" in text and "| one | 1.00 s" not in text and "| two | 3.00 s" in text
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert (tmp_path / "roofline-box-2026-01-02-b.png").stat().st_size > 5_000
    docs.write_text(text)
    assert report.docs_text(tmp_path / "results", docs) == text             # check draws nothing and agrees


def test_the_docs_are_what_the_committed_results_make():
    assert report.docs_text() == report.DOCS.read_text(encoding="utf-8"), "run: python benchmarks/report.py docs"


def test_every_benchmark_is_collected_and_the_gpu_parts_skip_with_their_reason():
    files = sorted(str(f) for f in (ROOT / "benchmarks").glob("bench_*.py"))
    assert {Path(f).stem.removeprefix("bench_") for f in files} == set(cli_bench.OPS)
    # pytest-benchmark times nothing in a process that xdist started, nor in one that inherits its variables
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "--benchmark-only", *files], cwd=ROOT,
                          env=environment, capture_output=True, text=True, check=False)
    if torch.cuda.is_available():
        pytest.skip("the reason is shown where there is no GPU")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "no CUDA device" in done.stdout and " passed" not in done.stdout and "skipped" in done.stdout


def test_bench_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli_bench, "FOLDER", tmp_path)
    assert cli.main(["bench"]) == 2
    assert "run ptv2 bench from a checkout" in capsys.readouterr().err
    assert cli.main(["bench", "--rounds", "0"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="would check the GPU")
def test_gpu_check_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, "benchmarks/gpu_check.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA device" in done.stdout


def test_the_gpu_stages_collect_without_what_that_machine_lacks():
    """No datasets and no seqeval there: a file that imports them would end every process of the stage."""
    script = ("import sys; sys.modules |= dict.fromkeys(('datasets', 'seqeval')); import pytest; "
              "sys.exit(pytest.main(['-q', '--collect-only', '-m', 'gpu', *sys.argv[1:]]))")
    benches = [f"benchmarks/bench_{name}.py" for name in (*gpu_check.BENCHES, "train_step", "autotuned")]
    for files in (["tests/gpu"], benches):
        done = subprocess.run([sys.executable, "-c", script, *files], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "error" not in done.stdout, done.stdout[-2000:]


def test_gpu_check_fails_with_any_stage_and_says_which(tmp_path):
    assert gpu_check.failure([0, 5, 0]) == 0 and gpu_check.failure([0, -11]) == -11 and gpu_check.failure([2, 0]) == 2
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    ends = {"good": "print('fine')", "bad": "import os; print('broke'); os.abort()"}
    both = lambda script: {str(i): [sys.executable, "-c", code] for i, code in enumerate((script, "0"))}
    stages = {name: (lambda log, limit, script=script: gpu_check.failure(gpu_check.together(both(script), log, limit)), 20)
              for name, script in ends.items()}
    kept: list[list[str]] = []
    found, logs = gpu_check.run_stages(stages, scratch, keep=lambda found: kept.append(list(found)))
    assert kept == [["good"], ["good", "bad"]]
    assert found["good"]["exit_code"] == 0 and found["bad"]["exit_code"] < 0 and "broke" in "".join(found["bad"]["log_end"])
    assert "==== good" in logs and "fine" in logs
    record = {"device": "a GPU", "date": "today", "commit": "c0ffee", "torch": "2", "command": "gpu_check", "stages": found}
    assert gpu_check.report(record, tmp_path, 0.0)
    assert "| bad | failed (-6) |" in (tmp_path / "report.md").read_text()
    done = subprocess.run([sys.executable, "benchmarks/gpu_check.py", "--only", "tset"], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2 and "tests" in done.stderr


def test_gpu_check_ends_a_stage_at_its_limit_and_lets_it_write(tmp_path):
    script = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('rows written', flush=True)"
    started = time.monotonic()
    assert gpu_check.run([sys.executable, "-c", script], tmp_path / "log", 2.0) == 124
    assert time.monotonic() - started < 30 and "rows written" in (tmp_path / "log").read_text()
    waits = lambda log, limit: gpu_check.run([sys.executable, "-c", script], log, limit)
    found, _ = gpu_check.run_stages({"first": (waits, 60), "second": (waits, 60)}, tmp_path, total=2)
    assert [stage["exit_code"] for stage in found.values()] == [124, 124]
    assert found["first"]["limit"] == 2 and found["second"]["last_line"] == "no time was left" and gpu_check.TOTAL < 480
