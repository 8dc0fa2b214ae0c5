"""ptv2 ablate: which runs a grid becomes, what is kept and repeated, and the numbers in its table."""

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

from ptv2_engine import ablate, presets
from ptv2_engine.ablate_grid import parse
from ptv2_engine.errors import ConfigError, RunFailed

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
GRID = ["--vary", "prompt_length=4,8", "reparameterization=none,mlp", "--seeds", "1,2,3", "--learning_rate", "5e-3",
        "--model_name_or_path", "some-bert", "--train_file", "x.csv"]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Runs are the script above; returns what it was asked so far."""
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


def test_finished_runs_are_kept_and_changed_settings_run_again(fake, tmp_path, capsys):
    argv = [*GRID, "--output_dir", str(tmp_path)]
    ablate.run(argv)
    before = results(tmp_path)
    ablate.run(argv)
    assert len(fake()) == 12 and results(tmp_path) == before
    assert "12 of 12 runs are done already" in capsys.readouterr().err
    ablate.run([*argv, "--seeds", "1,2,3,4"])                           # the fourth seed alone is new
    assert len(fake()) == 16 and {f["seed"] for f, *_ in fake()[12:]} == {"4"}
    ablate.run([w.replace("5e-3", "6e-3") for w in argv])
    assert len(fake()) == 28
    (tmp_path / "cells" / "prompt_length=8,reparameterization=mlp" / "seed-2" / "results.json").unlink()      # was interrupted
    ablate.run([w.replace("5e-3", "6e-3") for w in argv])
    assert len(fake()) == 29 and fake()[-1][0]["seed"] == "2" and fake()[-1][0]["prompt_length"] == "8"


def test_a_failed_run_is_reported_and_the_grid_goes_on(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAILS", "4")
    argv = [*GRID, "--output_dir", str(tmp_path), "--vary", "prompt_length=4,8"]
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


def test_results_of_other_settings_do_not_stand_in_for_a_failed_run(fake, tmp_path, monkeypatch):
    argv = ["--prompt_length", "4", "--seeds", "1", "--output_dir", str(tmp_path)]
    ablate.run(argv)
    monkeypatch.setenv("FAKE_FAILS", "4")
    with pytest.raises(RunFailed):
        ablate.run([*argv, "--learning_rate", "1e-2"])
    assert results(tmp_path)["cells"][0]["mean"] is None


def test_a_metric_that_no_run_has(fake, tmp_path):
    with pytest.raises(RunFailed, match=r"--metric f1 is not among what the run measured \(accuracy, loss\)"):
        ablate.run([*GRID, "--output_dir", str(tmp_path), "--metric", "f1"])
    ablate.run([*GRID, "--output_dir", str(tmp_path)])                  # the runs themselves were fine
    assert len(fake()) == 12


def test_jobs_run_side_by_side(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "0.4")
    ablate.run(["--prompt_length", "4", "--seeds", "1,2,3", "--output_dir", str(tmp_path), "--jobs", "3"])
    times = [(begin, end) for _, begin, end in fake()]
    assert max(b for b, _ in times) < min(e for _, e in times)


def test_an_interrupted_grid_ends_its_runs_and_goes_on_later(fake, tmp_path, monkeypatch):
    argv = ["--vary", "prompt_length=4,8,16", "--seeds", "1", "--output_dir", str(tmp_path / "out")]
    started, popen, report = [], subprocess.Popen, ablate.report

    def one_then_slow(*args):
        (tmp_path / "log.slow").touch()
        return report(*args)

    def interrupted(*args, **options):
        started.append(popen(*args, **options))
        if (tmp_path / "log.slow").exists():
            os.kill(os.getpid(), signal.SIGINT)
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


def test_it_needs_a_folder():
    with pytest.raises(ConfigError, match="Give --output_dir"):
        parse(["--preset", "rte-roberta-large", "--vary", "prompt_length=4,8"])       # the preset's own is for its own run


def test_a_value_of_none_leaves_a_flag_out_of_a_cell():
    cells = parse(["--preset", "wic-bert-large", "--vary", "reparam=none,mlp", "--output_dir", "x"]).cells
    assert [c.flags.get("reparameterization") for c in cells] == [None, ["mlp"]]
    assert [c.varied for c in cells] == [{"reparameterization": "none"}, {"reparameterization": "mlp"}]
    cells = parse(["--vary", "method=none,deep", "--output_dir", "x"]).cells
    assert [c.flags["method"] for c in cells] == [["none"], ["deep"]]                 # here it is a value


def test_the_published_search_is_108_runs_of_what_the_scripts_ran():
    grid = parse(["--grid", "copa-roberta-large", "--output_dir", "x"])
    assert len(grid.cells) == 108 and grid.seeds == [11]
    preset = presets.load_preset("copa-roberta-large")
    for cell in grid.cells:
        same = {n: v for n, v in cell.flags.items() if n not in ("learning_rate", "prompt_length", "num_train_epochs")}
        assert same == {n: preset[n] for n in same} and set(preset) - set(same) == {
            "learning_rate", "prompt_length", "num_train_epochs", "seed", "output_dir"}


def test_a_grid_file_has_flags_cells_and_seeds_and_the_command_line_wins(tmp_path):
    (tmp_path / "config.yaml").write_text("num_train_epochs: 7\nseed: 9\noutput_dir: elsewhere\n")
    (tmp_path / "grid.yaml").write_text(
        f"config: {tmp_path / 'config.yaml'}\nlearning_rate: 1e-2\npre_seq_len: 5\nseeds: [1, 2]\njobs: 2\n"
        "text_columns: [a, b]\nvary: {prompt_dropout: [0.0, 0.1]}\n"
        "cells:\n- {method: none, learning-rate: 1e-3}\n- {prompt_dropout: 0.1}\n")
    grid = parse(["--grid", str(tmp_path / "grid.yaml"), "--output-dir", "x", "--prompt_length", "6", "--jobs", "3", "--",
                  "--seed", "4"])
    assert grid.seeds == [1, 2] and grid.jobs == 3
    assert grid.base == {"num_train_epochs": ["7"], "learning_rate": ["1e-2"], "prompt_length": ["6"], "text_columns": ["a", "b"]}
    assert [c.varied for c in grid.cells] == [{"prompt_dropout": "0.0"}, {"prompt_dropout": "0.1"},
                                              {"method": "none", "learning_rate": "1e-3"}]      # equal cells are one
    assert grid.cells[2].flags["learning_rate"] == ["1e-3"]
    assert parse(["--config", str(tmp_path / "config.yaml"), "--output_dir", "x"]).seeds == [9]


def test_depth_follows_the_layers_of_the_backbone(tmp_path):
    config = {"model_type": "bert", "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100,
              "max_position_embeddings": 64, "type_vocab_size": 2, "num_hidden_layers": 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--model_name_or_path", str(tmp_path), "--output_dir", "x", "--depth"]
    spans = lambda *words: [c.varied["prompt_layers"] for c in parse([*argv, *words]).cells]
    assert spans("ascending") == ["1-4", "1-8", "1-12", "1-16", "1-20", "1-24"]
    assert spans("descending") == ["21-24", "17-24", "13-24", "9-24", "5-24", "1-24"]
    both = spans("ascending", "descending")
    assert len(both) == 11 == len(set(both))                            # every layer is one cell, on both lines
    assert spans("ascending,descending", "--depth_steps", "1,24") == ["1-1", "1-24", "24-24"]
    with pytest.raises(ConfigError, match="25 is more than the 24 layers"):
        spans("ascending", "--depth_steps", "25")
    from ptv2_engine.prompt import PromptConfig
    assert PromptConfig(prompt_layers="21-24").layers(24) == [20, 21, 22, 23]         # the top of the stack


def test_settings_hash_and_folder_names():
    make = lambda *words: parse([*words, "--output_dir", "x"]).cells
    one, two = make("--learning_rate", "1e-3", "--seed", "5")[0], make("--seed", "5", "--learning-rate=1e-3")[0]
    assert one.settings_hash(5) == two.settings_hash(5) != one.settings_hash(6)
    assert one.settings_hash(5) != make("--learning_rate", "2e-3")[0].settings_hash(5)
    names = [c.name for c in make("--vary", "model_name_or_path=a/b,a:b," + "c" * 300)]
    assert len(set(names)) == 3 and all(re.fullmatch(r"[\w.=,~+-]{1,120}", name) for name in names)


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
