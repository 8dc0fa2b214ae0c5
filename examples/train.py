"""Train a prompt with the drop-in Trainer: python examples/train.py BACKBONE FILE.jsonl OUTPUT (columns text, label)."""

from __future__ import annotations

import sys

import transformers

from ptv2_engine import PromptConfig, PromptedModel, Trainer
from ptv2_engine.tasks import Labels, encode_sequences, metrics_for, read_table


def main(backbone: str, file: str, output: str, epochs: float = 3.0) -> float:
    """Returns the accuracy on the training file."""
    table = read_table(file)
    labels = Labels.infer(table.column("label"), file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(backbone)
    model = PromptedModel.from_pretrained(backbone, id2label=labels.id2label, prompt=PromptConfig(prompt_length=16))
    features = encode_sequences(table, tokenizer, ["text"], model.max_length(), "label", labels)
    arguments = transformers.TrainingArguments(
        output, num_train_epochs=epochs, learning_rate=3e-2, report_to=[], save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=features, eval_dataset=features, processing_class=tokenizer,
                      compute_metrics=metrics_for(labels.kind, labels.names))
    trainer.train()
    model.save_pretrained(output)
    return trainer.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    print(main(*sys.argv[1:4]))
