"""A small GPT-2-like vocabulary, trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path

TEXT = ["the cat sat on the mat because it was tired and the mat was soft", " Yes No Maybe true false",
        "Is it true that it rained?",
        "the pronoun 'he' refers to Mark told Pete many lies about himself", "Question: Answer: Similar sense of",
        "It rained, so the street was wet.", "my body cast a shadow over the grass"]


def write(folder: Path, size: int = 400) -> Path:
    """vocab.json and merges.txt in folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    return folder


def write_published_size(folder: Path) -> Path:
    """The same padded to GPT-2's 50257 entries, <|endoftext|> last."""
    write(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary |= {f"filler{i}": i for i in range(len(vocabulary), 50256)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": 50256}))
    return folder
