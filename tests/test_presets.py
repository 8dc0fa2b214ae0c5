"""The published settings: every preset against the table of the published scripts, written down here a second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ptv2_engine import presets
from ptv2_engine.cli_args import parse_train
from ptv2_engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
# script: checkpoint, task, data set, rate, batch, epochs, prompt length, dropout, seed, sequence length, template, projection
TABLE = """
boolq_bert        bert-large-cased    superglue  boolq      0.005   32  100   40  0.1  11  128  0  -
boolq_roberta     roberta-large       superglue  boolq      0.007   32  100    8  0.1  11  128  0  -
copa_bert         bert-large-cased    superglue  copa       0.01    16   80   16  0.1  44  128  0  -
copa_roberta      roberta-large       superglue  copa       0.009   16  120    8  0.1  11  128  0  -
rte_bert          bert-large-cased    superglue  rte        0.01    32   60   20  0.1  11  128  0  -
rte_roberta       roberta-large       superglue  rte        0.005   32  100  128  0.1  11  128  0  -
wic_bert          bert-large-cased    superglue  wic        0.0001  16   80   20  0.1  44  128  1  mlp
wic_roberta       roberta-large       superglue  wic        0.01    32   50    8  0.1  11  128  0  -
wsc_bert          bert-large-cased    superglue  wsc        0.005   16   80   20  0.1  44  128  0  -
wsc_roberta       roberta-large       superglue  wsc        0.01    16   10    8  0.1  44  128  0  -
conll03_roberta   roberta-large       ner        conll2003  0.03    16   30   11  0.1  11  512  0  -
conll04_bert      bert-large-uncased  ner        conll2004  0.02    32   40  128  0.2  11  512  0  -
conll04_roberta   roberta-large       ner        conll2004  0.06    32   80  144  0.1  11  512  0  -
ontonotes_bert    bert-large-uncased  ner        ontonotes  0.01    16   30   16  0.1  11  512  0  -
ontonotes_roberta roberta-large       ner        ontonotes  0.007   16   60   48  0.1  14  512  0  -
conll05_roberta   roberta-large       srl        conll2005  0.006   16   15  224  0.1  11  512  0  -
conll12_bert      bert-large-cased    srl        conll2012  0.005   16   45  128  0.1  11  512  0  -
conll12_roberta   roberta-large       srl        conll2012  0.005   32   45   64  0.1  11  512  0  -
squad_roberta     roberta-large       qa         squad      0.005    8   30   16  0.2  11  384  0  -
squad_v2_roberta  roberta-large       qa         squad_v2   0.005    8   10    8  0.2  11  384  0  -
"""


def published():
    """Preset name -> row of the table."""
    rows = [line.split() for line in TABLE.strip().splitlines()]
    return {f"{row[3]}-{'roberta' if row[0].endswith('_roberta') else 'bert'}-large": row for row in rows}


def argv_of(flags):
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


def test_there_is_a_preset_for_every_published_script_and_no_other():
    names = [name for name, _ in presets.list_presets()]
    assert names == sorted(published()) and len(names) == 20


@pytest.mark.parametrize("name", sorted(published()))
def test_a_preset_is_what_the_published_script_says(name):
    _, model, task, dataset, rate, batch, epochs, length, dropout, seed, tokens, template, projection = published()[name]
    model_args, data, prompt, args, notes = parse_train(argv_of(presets.load_preset(name)))
    assert not notes                            # nothing in it is without effect
    assert (model_args.model_name_or_path, data.task_name, data.dataset_name) == (model, task, dataset)
    assert (args.learning_rate, args.num_train_epochs) == (float(rate), float(epochs))
    assert (args.per_device_train_batch_size, args.seed) == (int(batch), int(seed))
    assert (prompt.prompt_length, data.max_seq_length, data.template_id) == (int(length), int(tokens), int(template))
    assert model_args.hidden_dropout_prob == float(dropout)
    assert prompt.reparameterization == (None if projection == "-" else projection)
    assert prompt.reparameterization_hidden == 512 and prompt.prompt_layers == "all"
    assert args.eval_strategy == "epoch" and args.weight_decay == 0.0 and args.lr_scheduler_type == "linear"


def test_presets_do_not_share_an_output_folder():
    folders = [presets.load_preset(name)["output_dir"] for name, _ in presets.list_presets()]
    assert len({tuple(f) for f in folders}) == 20       # the published WSC scripts write into one folder


def test_summaries_and_comments_say_what_differs_from_the_script():
    for name, summary in presets.list_presets():
        assert "published" in summary and "%" in summary and "\n" not in summary
        text = (presets.FOLDER / f"{name}.yaml").read_text()
        assert ("--max_seq_length" in text) == (presets.load_preset(name)["task_name"][0] in ("ner", "srl", "qa"))
    assert "roberta-large by mistake" in (presets.FOLDER / "conll2012-bert-large.yaml").read_text()


def test_later_flags_win_over_a_preset():
    flags = presets.load_preset("wic-bert-large") | {"learning_rate": ["3e-4"]}
    assert parse_train(argv_of(flags))[3].learning_rate == 3e-4


@pytest.mark.parametrize("name, words", [("rte-robert-large", "did you mean rte-roberta-large"),
                                         ("RTE-BERT-LARGE", "did you mean rte-bert-large"),
                                         ("zzz", "there are boolq-bert-large, boolq-roberta-large, conll2003")])
def test_a_wrong_name_names_the_nearest(name, words):
    with pytest.raises(ConfigError, match=words):
        presets.load_preset(name)


def test_the_published_search_is_a_grid_of_108():
    grid = presets.read_yaml(presets.find_grid("copa-roberta-large"), "--grid")
    assert [[float(v) for v in grid["vary"][k]] for k in ("learning_rate", "prompt_length", "num_train_epochs")] == [
        [5e-3, 7e-3, 1e-2], [4, 8, 16, 32, 64, 128], [20, 40, 60, 80, 100, 120]]
    assert grid["preset"] == "copa-roberta-large" and grid["seeds"] == [11]
    with pytest.raises(ConfigError, match="--grid none does not exist.*copa-roberta-large"):
        presets.find_grid("none")


@pytest.mark.parametrize("content, words", [("a: [", "is not valid YAML"), ("- 1\n", "must hold keys and values"),
                                            ("a: {b: 1}\n", "a holds a mapping")])
def test_bad_files(content, words, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigError, match=words):
        presets.flags_of(presets.read_yaml(tmp_path / "x.yaml", "--config"), "--config")


def test_words_are_not_booleans(tmp_path):
    (tmp_path / "x.yaml").write_text("save_strategy: no\nbf16: true\nlearning_rate: 5e-3\ntext-columns: [a, on]\nseed: null\n")
    assert presets.flags_of(presets.read_yaml(tmp_path / "x.yaml", "--config"), "--config") == {
        "save_strategy": ["no"], "bf16": ["True"], "learning_rate": ["5e-3"], "text_columns": ["a", "on"]}


def test_the_package_ships_them():
    import tomllib

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ptv2_engine"]
    files = {p.relative_to(ROOT / "ptv2_engine") for p in presets.FOLDER.rglob("*.yaml")}
    assert len(files) == 21 and files == {p.relative_to(ROOT / "ptv2_engine") for w in wanted
                                          for p in (ROOT / "ptv2_engine").glob(w) if p.suffix == ".yaml"}
    for file in files:                          # no duplicate keys: the last would win in silence
        keys = [line.split(":")[0] for line in (ROOT / "ptv2_engine" / file).read_text().splitlines()
                if line[:1] not in ("#", " ", "")]
        assert len(keys) == len(set(keys)) == len(yaml.safe_load((ROOT / "ptv2_engine" / file).read_text()))
