"""ptv2 ablate: the cells that flags and grid files become, and the metrics that tasks are known to have."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from ptv2_engine import presets
from ptv2_engine.ablate_grid import parse
from ptv2_engine.errors import ConfigError
from ptv2_engine.tasks.choices import ChoiceTask
from ptv2_engine.tasks.cloze_task import ClozeTask
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.metrics import seqeval_scores
from ptv2_engine.tasks.sequences import SequenceTask
from ptv2_engine.tasks.spans import SpanTask
from ptv2_engine.tasks.squad_metrics import squad_scores
from ptv2_engine.tasks.tags import TagTask


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
    assert make("--vary", "model_name_or_path=a:b")[0].name == names[1]              # whatever other cells there are
    assert [c.name for c in make("--vary", "prompt_length=4", "--vary", "bf16=true")] == ["prompt_length=4,bf16=true"]


def test_the_metric_names_of_tasks_are_what_they_measure():
    """Those of tasks whose metrics do not need predictions of a shape of their own."""
    classes = ("0", "1")
    for task in (SequenceTask(["a"], "label", "values", []), SequenceTask(["a"], "label", "classes", classes),
                 SequenceTask(["a"], "label", "classes", classes, extra_metrics=["f1", "matthews"]),
                 SequenceTask(["a"], "label", "classes", classes, group="multirc"),
                 SequenceTask(["a"], "label", "classes", classes, group="record"),
                 ClozeTask({"template": "{a} {mask}", "verbalizers": ["0= no", "1= yes"]}),
                 ChoiceTask(["a"], ["b", "c"], "label")):
        rows = [{"a": "x", "label": i, "idx": {"paragraph": 0, "question": 0}, "entity": "x", "answers": ["x"]} for i in (0, 1)]
        features = [{"row": i, "labels": i, "input_ids": [[1], [2]]} for i in (0, 1)]
        width = 1 if isinstance(task, SequenceTask) and task.label_kind == "values" else 2
        scores = np.arange(2.0 * width).reshape(2, width)
        found = task.metrics(Table(rows, "x"), features)(SimpleNamespace(predictions=scores, label_ids=None))
        assert set(found) == set(task.metric_names()), task
    golds = [["x"], []]
    assert set(squad_scores(golds, ["x", ""], unanswerable=True, null_scores=[0.0, 1.0])) == set(
        SpanTask(unanswerable=True).metric_names())
    assert set(squad_scores(golds[:1], ["x"])) == set(SpanTask().metric_names())
    assert set(seqeval_scores([["B-X"]], [["B-X"]])) | {"accuracy"} == set(TagTask("w", "t", ["B-X"]).metric_names())
    assert TagTask("w", "t", ["NOUN"]).metric_names() == ("accuracy",)
