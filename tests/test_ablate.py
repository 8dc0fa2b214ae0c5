"""ptv2 ablate: what is run, kept, repeated and refused, and the numbers in its table."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest

from ptv2_engine import ablate, ablate_grid
from ptv2_engine.errors import ConfigError, DataError, RunFailed

# stands for `ptv2 train`: says what it was asked in a log, and measures what can be computed by hand
FAKE = """
import json, os, sys, time
words, flags = sys.argv[1:], {}
for w in words:
    if w.startswith("--"):
        name = w[2:]; flags[name] = []
    else:
        flags[name].append(w)
flags = {n: " ".join(v) for n, v in flags.items()}
begin = time.time()
log = os.environ["FAKE_LOG"]
time.sleep(60 if os.path.exists(log + ".slow") else float(os.environ.get("FAKE_SLEEP", 0)))
if flags["prompt_length"] == os.environ.get("FAKE_FAILS"):
    open(log, "a").write(json.dumps([flags, begin, time.time()]) + "\\n")
    print("Traceback\\nptv2: the loss is NaN at step 3; lower the rate.\\n", file=sys.stderr); sys.exit(2)
value = int(flags["prompt_length"]) / 100 + int(flags["seed"]) / 1000 + 0.1 * ("reparameterization" in flags)
json.dump({"output_dir": flags["output_dir"], "metric": "accuracy", "trained_parameters": 1000 * int(flags["prompt_length"]),
           "seconds": 3.0, "test": {"test_accuracy": value - 0.2},
           "best_evaluation": {"eval_accuracy": value, "eval_loss": 1 - value, "epoch": 2.0},
           "last_evaluation": {"eval_accuracy": value - 0.1, "eval_loss": 1.0, "epoch": 3.0}},
          open(os.path.join(flags["output_dir"], "results.json"), "w"))
open(log, "a").write(json.dumps([flags, begin, time.time()]) + "\\n")
"""
DATA = ["--model_name_or_path", "some-bert", "--train_file", "x.csv", "--validation_file", "x.csv", "--test_file", "x.csv"]
GRID = ["--vary", "prompt_length=4,8", "reparameterization=none,mlp", "--seeds", "1,2,3", "--learning_rate", "5e-3", *DATA]
ONE = ["--prompt_length", "4", "--seeds", "1", *DATA, "--output_dir", "out"]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Runs are the script above, in a folder with data; returns what it was asked so far."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("text,label\na good film,1\na bad film,0\n")
    (tmp_path / "train.py").write_text(FAKE)
    monkeypatch.setattr(ablate, "TRAIN", [sys.executable, "-S", str(tmp_path / "train.py")])
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    (tmp_path / "log").touch()
    return lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_grid_runs_every_cell_with_every_seed(fake, tmp_path):
    ablate.run([*GRID, "--output_dir", str(tmp_path / "out")])
    asked = [flags for flags, *_ in fake()]
    assert sorted((f["prompt_length"], f.get("reparameterization", "none"), f["seed"]) for f in asked) == sorted(
        (p, r, s) for p in ("4", "8") for r in ("none", "mlp") for s in "123")
    assert all(f["learning_rate"] == "5e-3" and f["train_file"] == "x.csv" for f in asked)
    assert len({f["output_dir"] for f in asked}) == 12
    folder = tmp_path / "out" / "cells" / "prompt_length=4,reparameterization=none"
    assert {asked[0]["output_dir"], asked[1]["output_dir"]} == {str(folder / "seed-1"), str(folder / "seed-2")}


def test_means_and_standard_deviations_are_those_of_the_runs(fake, tmp_path, capsys):
    ablate.run([*GRID, "--output_dir", str(tmp_path / "out")])
    found = results(tmp_path / "out")
    assert (found["metric"], found["at"], found["seeds"]) == ("accuracy", "best", [1, 2, 3])
    by_cell = {tuple(c["varied"].values()): c for c in found["cells"]}
    for (length, kind), cell in by_cell.items():
        values = [int(length) / 100 + seed / 1000 + (0.1 if kind == "mlp" else 0.0) for seed in (1, 2, 3)]
        assert [r["value"] for r in cell["runs"]] == pytest.approx(values)
        assert cell["mean"] == pytest.approx(sum(values) / 3) and cell["n"] == 3
        assert cell["std"] == pytest.approx(statistics.stdev(values))
        assert cell["trained_parameters"] == 1000 * int(length) and cell["seconds"] == 3.0
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.startswith("`ptv2 train --learning_rate 5e-3 --model_name_or_path some-bert")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    assert rows[0] == ["prompt_length", "reparameterization", "trained parameters", "accuracy", "std", "n", "time"]
    assert rows[2] == ["4", "none", "4,000", "0.0420", "0.0010", "3", "3 s"]
    assert rows[5] == ["8", "mlp", "8,000", "**0.1820**", "0.0010", "3", "3 s"] and table.count("**") == 2
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("more, value", [([], 0.042), (["--at", "last"], -0.058), (["--at", "test"], -0.158),
                                         (["--metric", "eval_loss"], 0.958)])
def test_which_value_counts(more, value, fake, tmp_path):
    ablate.run([*GRID, "--output_dir", str(tmp_path), *more])
    assert results(tmp_path)["cells"][0]["mean"] == pytest.approx(value)
    best = re.findall(r"\*\*(\S+)\*\*", (tmp_path / "table.md").read_text())
    means = [c["mean"] for c in results(tmp_path)["cells"]]
    assert best == [f"{(min if 'eval_loss' in more else max)(means):.4f}"]          # a loss is better when it is smaller


def test_finished_runs_are_kept(fake, tmp_path, capsys):
    argv = [*GRID, "--output_dir", str(tmp_path)]
    ablate.run(argv)
    before = results(tmp_path)
    ablate.run(argv)
    assert len(fake()) == 12 and results(tmp_path) == before
    assert "12 of 12 runs are done already" in capsys.readouterr().err
    ablate.run([*argv, "--seeds", "1,2,3,4"])                           # the fourth seed alone is new
    assert len(fake()) == 16 and {f["seed"] for f, *_ in fake()[12:]} == {"4"}
    (tmp_path / "cells" / "prompt_length=8,reparameterization=mlp" / "seed-2" / "results.json").write_text('{"metr')    # no space
    ablate.run(argv)
    assert len(fake()) == 17 and fake()[-1][0]["seed"] == "2" and fake()[-1][0]["prompt_length"] == "8"


def test_a_failed_run_is_reported_and_the_grid_goes_on(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAILS", "4")
    argv = ["--vary", "prompt_length=4,8", *GRID[3:], "--output_dir", str(tmp_path)]
    with pytest.raises(RunFailed, match=r"3 of 6 runs failed \(prompt_length=4, seed 1: the loss is NaN at step 3"):
        ablate.run(argv)
    assert len(fake()) == 6
    cells = results(tmp_path)["cells"]
    assert [(c["n"], c["mean"] is None) for c in cells] == [(0, True), (3, False)]
    assert all(r["error"] == "the loss is NaN at step 3; lower the rate." for r in cells[0]["runs"])
    assert "- prompt_length=4, seed 2: the loss is NaN" in (tmp_path / "table.md").read_text()
    assert "failed: the loss is NaN" in capsys.readouterr().err
    monkeypatch.delenv("FAKE_FAILS")
    ablate.run(argv)                                                    # only those that failed
    assert len(fake()) == 9 and {f["prompt_length"] for f, *_ in fake()[6:]} == {"4"}
    assert "Failed" not in (tmp_path / "table.md").read_text()


def test_runs_of_other_settings_are_not_written_over(fake, tmp_path, monkeypatch):
    ablate.run(["--vary", "prompt_length=4,8", *ONE])
    kept = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    for argv, differs in ((["--num_train_epochs", "3"], "--num_train_epochs was not given, and now is 3"),
                          (["--train_file", "y z.csv"], "--train_file was x.csv, and now is 'y z.csv'")):
        with pytest.raises(ConfigError, match=re.escape(
                f"out holds finished runs of other settings, 2 of them in this grid (prompt_length=4, seed 1: {differs}); give "
                "another --output_dir")):
            ablate.run(["--vary", "prompt_length=4,8,16", *ONE, *argv])
    assert {file: file.read_bytes() for file in kept} == kept and len(fake()) == 2
    (tmp_path / "out/cells/prompt_length=8/seed-1/ablate.json").unlink()         # whose results are these?
    with pytest.raises(ConfigError, match="1 of them in this grid .prompt_length=8, seed 1: its ablate.json does not say which"):
        ablate.run(["--vary", "prompt_length=4,8", *ONE])
    monkeypatch.setenv("FAKE_FAILS", "4")
    with pytest.raises(RunFailed):                                      # old results do not stand in for a run that fails
        ablate.run(["--vary", "prompt_length=4,8", *ONE, "--num_train_epochs", "3", "--overwrite_output_dir"])
    assert [c["mean"] for c in results(tmp_path / "out")["cells"]] == [None, pytest.approx(0.081)]


def test_a_larger_grid_takes_up_what_it_shares(fake, tmp_path):
    rate = ["--learning_rate", "5e-3"]
    ablate.run(["--vary", "prompt_length=4,8", *ONE, *rate])
    ablate.run(["--vary", "prompt_length=4,8,16", *ONE, *rate])
    assert len(fake()) == 3
    for vary in (["learning_rate=5e-3,1e-2", "prompt_length=8,4"], ["prompt_length=4,8", "learning_rate=1e-2,5e-3"]):
        ablate.run(["--vary", *vary, *ONE])
        assert len(fake()) == 5 and all(c["n"] == 1 for c in results(tmp_path / "out")["cells"])


@pytest.mark.parametrize("argv, words", [
    (["--metric", "foo"], "--metric foo is not among what the runs measure (accuracy, loss,"),
    ([*ONE[4:8], "--at", "test"], "there is no test data beside the training data of x.csv; give --test_file with labels"),
    ([*ONE[4:8]], "there is no validation data beside the training data of x.csv; give --validation_file with labels"),
    (["--eval_strategy", "no"], "--eval_strategy no measures nothing"),
    (["--test_file", "unlabelled.csv", "--at", "test"], "the test data has no labels"),
    (["--multi_task", "sets.yaml"], "--multi_task sets.yaml has a metric for each data set"),
    (["--vary", "train_file=x.csv,nowhere.csv"], "nowhere.csv"),
])
def test_data_that_cannot_give_the_score_is_refused_before_anything_runs(argv, words, fake, tmp_path):
    (tmp_path / "unlabelled.csv").write_text("text,label\nwho knows,\n")
    given = argv if argv[0] == DATA[0] else [*DATA, *argv]
    with pytest.raises((ConfigError, DataError), match=re.escape(words)):
        ablate.run([*given, "--output_dir", "out"])
    assert not fake() and not (tmp_path / "out").exists()


def test_each_data_set_is_read_once_and_finished_runs_are_asked_themselves(fake, monkeypatch):
    read, load = [], ablate_grid.load_data
    monkeypatch.setattr(ablate_grid, "load_data", lambda data: read.append(data.train_file) or load(data))
    ablate.run(["--vary", "max_train_samples=2,3", "max_seq_length=16,32", *ONE])
    assert read == ["x.csv"]
    with pytest.raises(ConfigError, match=r"--metric f1 is not among what the run measured \(accuracy, loss\)"):
        ablate.run(["--vary", "max_train_samples=2,3", "max_seq_length=16,32", *ONE, "--metric", "f1"])
    assert read == ["x.csv"] and len(fake()) == 4


def test_a_run_that_is_killed_says_so(fake, monkeypatch, tmp_path):
    (tmp_path / "train.py").write_text("import os, sys; print('Loading', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(RunFailed, match="it was ended by SIGKILL"):
        ablate.run(ONE)
    (tmp_path / "train.py").write_text("import sys; print('a warning', file=sys.stderr)")
    with pytest.raises(RunFailed, match="it wrote no results.json"):
        ablate.run(ONE)


def test_jobs_run_side_by_side(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "0.4")
    ablate.run([*ONE, "--seeds", "1,2,3", "--jobs", "3"])
    times = [(begin, end) for _, begin, end in fake()]
    assert max(b for b, _ in times) < min(e for _, e in times)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_grid_ends_its_runs_and_goes_on_later(number, fake, tmp_path, monkeypatch):
    argv = ["--vary", "prompt_length=4,8,16", *ONE]
    started, popen, report = [], subprocess.Popen, ablate.report

    def one_then_slow(*args):
        (tmp_path / "log.slow").touch()
        return report(*args)

    def interrupted(*args, **options):
        started.append(popen(*args, **options))
        if (tmp_path / "log.slow").exists():
            os.kill(os.getpid(), number)
        return started[-1]

    with monkeypatch.context() as patched:
        patched.setattr(ablate.subprocess, "Popen", interrupted)
        patched.setattr(ablate, "report", one_then_slow)
        begin = time.time()
        with pytest.raises(KeyboardInterrupt):
            ablate.run(argv)
        assert all(p.wait(timeout=20) is not None for p in started) and time.time() - begin < 30
    done = len(fake())
    assert 1 <= done < len(started) <= 3                                # those that slept were ended
    (tmp_path / "log.slow").unlink()
    ablate.run(argv)
    assert [c["n"] for c in results(tmp_path / "out")["cells"]] == [1, 1, 1] and len(fake()) == 3


def test_a_dry_run_prints_the_runs_and_writes_nothing(fake, tmp_path, capsys):
    ablate.run([*GRID, "--output_dir", str(tmp_path / "out"), "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "# 4 cells x 3 seeds = 12 runs, 0 done" and len(lines) == 13
    assert lines[0].startswith("ptv2 train --learning_rate 5e-3") and "--prompt_length 4 --seed 1 --output_dir" in lines[0]
    assert not (tmp_path / "out").exists() and not fake()


@pytest.mark.parametrize("argv, words", [
    (["--learning_rat", "1"], "cell base: --learning_rat is not a flag of ptv2 train; did you mean --learning_rate"),
    (["--vary", "prompt_length=4,0"], "cell prompt_length=0: prompt_length 0 is below 1"),
    (["--vary", "learning_rate=1e-3,fast"], "cell learning_rate=fast: "),
    (["--vary", "prompt_length"], "write FLAG=A,B"),
    (["--vary", "prompt_length="], "has 0 values"),
    (["--vary", "seed=1,2"], "use --seeds"),
    (["--vary", "prompt_length=4", "--vary", "pre_seq_len=8"], "--vary prompt_length is there twice"),
    (["--vary", "promt_length=4,8"], "--promt_length is not a flag of ptv2 train; did you mean --prompt_length"),
    (["--depth_steps", "1,2"], "add --depth ascending"),
    (["--vary", "output_dir=a,b"], "a folder of its own"),
    (["--seeds", "one"], "--seeds one is not understood"),
    (["--jobs", "0"], "--jobs 0 is below 1"),
    (["--depth", "up", "--model_name_or_path", "x"], "--depth up is not understood"),
    (["--depth", "ascending"], "give --model_name_or_path"),
    (["--depth", "ascending", "--prompt_layers", "3"], "both say which layers"),
    (["--figure", "depth"], "--figure depth needs cells that differ in prompt_layers"),
    (["--figure", "pie"], "invalid choice: 'pie'"),
    (["--grid", "nowhere"], "--grid nowhere does not exist"),
    (["--preset", "rte-roberta-lage"], "did you mean rte-roberta-large"),
])
def test_what_cannot_work_is_said_before_anything_runs(argv, words, fake, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(words)):
        ablate.run([*argv, "--output_dir", str(tmp_path / "out")])
    assert not fake() and not (tmp_path / "out").exists()


def test_without_matplotlib_the_table_is_there(fake, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    ablate.run([*GRID, "--output_dir", str(tmp_path)])
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert (tmp_path / "table.md").exists() and not list(tmp_path.glob("*.png"))


def test_the_runs_are_what_ptv2_train_does(tmp_path, monkeypatch, capsys):
    """Nothing stands in for training here but the process: its flags are taken, and its results.json is understood."""
    import transformers

    from ptv2_engine.cli import main
    from ptv2_engine.testing import tiny_model

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", *(f"w{i}" for i in range(112))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tiny_model("bert").save_pretrained(tmp_path / "backbone")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "backbone")
    (tmp_path / "x.csv").write_text("text,label\n" + "".join(f"{w} film,{w}\n" for w in ("good", "bad") * 8))

    class InThisProcess:
        def __init__(self, command, **_):
            assert command[1:3] == ["-m", "ptv2_engine.cli"]
            self.code = main(command[3:])

        def wait(self):
            return self.code

    monkeypatch.setattr(ablate.subprocess, "Popen", InThisProcess)
    ablate.run(["--model_name_or_path", str(tmp_path / "backbone"), "--train_file", str(tmp_path / "x.csv"), "--validation_file",
                str(tmp_path / "x.csv"), "--depth", "ascending", "descending", "--depth_steps", "1,3", "--prompt_length", "4",
                "--num_train_epochs", "2", "--use_cpu", "--output_dir", str(tmp_path / "out")])
    found = results(tmp_path / "out")
    assert [c["varied"]["prompt_layers"] for c in found["cells"]] == ["1-1", "1-3", "3-3"] and found["metric"] == "accuracy"
    for cell, layers in zip(found["cells"], (1, 3, 1), strict=True):
        run = cell["runs"][0]["results"]
        assert cell["mean"] == run["best_evaluation"]["eval_accuracy"] >= run["last_evaluation"]["eval_accuracy"]
        assert cell["trained_parameters"] == 4 * 2 * layers * 64 + 2 * 64 + 2      # P x (K, V) x layers x H, and the head
    assert (tmp_path / "out" / "depth.png").exists()
