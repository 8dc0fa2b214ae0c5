"""What `ptv2 evaluate` and `ptv2 predict` do: an adapter, its tokenizer and its settings, applied to a file or to texts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ptv2_engine.batches import PackedCollator
from ptv2_engine.cli_train import SETTINGS, load_tokenizer, make_features
from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.model import PromptedModel
from ptv2_engine.packing import IGNORE
from ptv2_engine.tasks.cloze import describe_pattern
from ptv2_engine.tasks.cloze_patterns import Blank
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.features import Labels
from ptv2_engine.tasks.metrics import metrics_for


class Predictor:
    """A loaded adapter that labels tables of text."""

    def __init__(self, model: PromptedModel, tokenizer: Any, settings: dict[str, Any], batch_size: int) -> None:
        self.model, self.tokenizer, self.settings, self.batch_size = model.eval(), tokenizer, settings, batch_size
        self.labels = Labels(settings["kind"], settings["labels"])
        self.pattern = describe_pattern(settings["cloze"]) if settings.get("cloze") else None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Predictor:
        folder = Path(args.adapter)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        for name in ("batch_size", "max_seq_length"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise ConfigError(f"--{name} {value} is below 1; use 1 or more.")
        placement = {"frozen_dtype": None if args.frozen_dtype == "none" else args.frozen_dtype} if args.frozen_dtype else {}
        model = PromptedModel.from_adapter(folder, backbone=args.backbone, dtype=dtype, device=device,
                                           stream_weights=args.stream_weights, **placement)
        settings = _settings(folder, model)
        if args.text_columns:
            settings["text_columns"] = args.text_columns
        if args.max_seq_length:
            settings["max_seq_length"] = min(args.max_seq_length, model.max_length())
        has_own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        tokenizer_at = str(folder) if has_own else str(args.backbone or model.origin.location)
        tokenizer = _own_tokenizer(folder) if has_own else load_tokenizer(tokenizer_at, settings["kind"] == "tags")
        return cls(model, tokenizer, settings, args.batch_size)

    def features(self, table: Table, label_column: str | None = None) -> list[dict[str, Any]]:
        return make_features(table, self.tokenizer, self.settings["text_columns"], self.settings["max_seq_length"], label_column,
                             self.labels, self.pattern)

    @torch.no_grad()
    def logits(self, features: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Each feature with its logits: [C], or [its tokens, C]."""
        collate = PackedCollator()
        for start in range(0, len(features), self.batch_size):
            part = features[start:start + self.batch_size]
            batch = collate([{k: v for k, v in f.items() if k not in ("label", "labels", "word_ids")} for f in part])
            inputs = {k: v.to(self.model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            for feature, row in zip(part, self.model(**inputs).logits.float().cpu().numpy(), strict=True):
                yield feature, row[:len(feature["input_ids"])] if self.labels.kind == "tags" else row

    def evaluate(self, file: str, label_column: str | None = None) -> dict[str, float]:
        """Metrics over a labelled file."""
        pairs = list(self.logits(self.features(read_table(file), label_column or self.settings["label_column"])))
        if self.labels.kind == "tags":
            longest = max(len(row) for _, row in pairs)
            scores = np.stack([np.pad(row, ((0, longest - len(row)), (0, 0))) for _, row in pairs])
            truth = np.array([f["labels"] + [IGNORE] * (longest - len(f["labels"])) for f, _ in pairs])
        else:
            scores = np.stack([row.argmax() if self.labels.kind == "candidates" else row for _, row in pairs])
            truth = np.array([f["label" if self.pattern else "labels"] for f, _ in pairs])
        found = metrics_for(self.labels.kind, self.labels.names)(SimpleNamespace(predictions=scores, label_ids=truth))
        return {"examples": len(pairs)} | found

    def predict_file(self, file: str) -> list[dict[str, Any]]:
        return self.predict(read_table(file))

    def predict_texts(self, texts: list[str]) -> list[dict[str, Any]]:
        """Texts as given on the command line; words are split at spaces for tagging. Raises DataError for text pairs."""
        columns = self.settings["text_columns"]
        if self.pattern is not None:
            raise DataError("this adapter fills the blank of a pattern over several columns; give --file with them.")
        if len(columns) > 1:
            raise DataError(f"this adapter labels pairs of {' and '.join(columns)}; give --file with these columns.")
        split = self.labels.kind == "tags"
        return self.predict(Table([{columns[0]: t.split() if split else t} for t in texts], "the given texts"))

    def predict(self, table: Table) -> list[dict[str, Any]]:
        """One row an example: its text, its label and the label's probability (or the value, or a tag a word)."""
        if not table.rows:
            raise DataError("there are 0 texts to label; pass some, or --file.")
        if self.pattern is not None:
            scored = self.logits(self.features(table))
            return [self._filled(row, scores) for row, (_, scores) in zip(table.rows, scored, strict=True)]
        texts = list(zip(*(table.column(c) for c in self.settings["text_columns"]), strict=True))
        return [{"text": self._shown(text)} | self._answer(feature, row)
                for text, (feature, row) in zip(texts, self.logits(self.features(table)), strict=True)]

    def _filled(self, row: dict[str, Any], scores: np.ndarray) -> dict[str, Any]:
        """The row's text with its blank, and what fills it best."""
        assert self.pattern is not None
        parts = self.pattern.build(row)
        text = "".join("[MASK]" if isinstance(part, Blank) else part for part in parts)
        names = self.labels.names if self.pattern.answers is None else [a.strip() for a in self.pattern.answers(row)[0]]
        shifted = np.exp(scores - scores.max())
        return {"text": text, "label": names[int(scores.argmax())], "probability": float(shifted.max() / shifted.sum())}

    @staticmethod
    def _shown(text: tuple[Any, ...]) -> str:
        return " | ".join(" ".join(t) if isinstance(t, list) else str(t) for t in text)

    def _answer(self, feature: dict[str, Any], row: np.ndarray) -> dict[str, Any]:
        if self.labels.kind == "values":
            return {"value": float(row[0])}
        if self.labels.kind == "tags":
            ids = feature["word_ids"]
            firsts = [i for i, w in enumerate(ids) if w is not None and (i == 0 or w != ids[i - 1])]
            return {"tags": " ".join(self.labels.names[int(row[i].argmax())] for i in firsts)}
        shifted = np.exp(row - row.max())
        return {"label": self.labels.names[int(row.argmax())], "probability": float(shifted.max() / shifted.sum())}


def _settings(folder: Path, model: PromptedModel) -> dict[str, Any]:
    """What training wrote beside the adapter, or defaults for one made in Python."""
    file = folder / SETTINGS
    if file.is_file():
        return json.loads(file.read_text())
    kind = "tags" if model.task == "token-classification" else "values" if model.problem_type == "regression" else "classes"
    return {"text_columns": ["words" if kind == "tags" else "text"], "label_column": "tags" if kind == "tags" else "label",
            "max_seq_length": min(128, model.max_length()), "labels": list(model.id2label.values()), "kind": kind}


def _own_tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(str(folder))
