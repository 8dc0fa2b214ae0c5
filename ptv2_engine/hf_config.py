"""What transformers' rules make of a checkpoint's config: label names, the head's dropout, a config object."""

from __future__ import annotations

from typing import Any

from ptv2_engine.errors import ConfigError


def label_names(config: dict[str, Any], num_labels: int | None, id2label: dict[int, str] | None,
            label2id: dict[str, int] | None) -> dict[int, str]:
    """transformers' rule: the names given, else the checkpoint's where their number fits, else LABEL_0, LABEL_1, ..."""
    if id2label is None and label2id is not None:
        id2label = {i: name for name, i in label2id.items()}
    names = {int(i): str(name) for i, name in (id2label or {}).items()}
    own = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    if not names:
        count = num_labels if num_labels is not None else len(own) or 2
        names = own if len(own) == count else {i: f"LABEL_{i}" for i in range(count)}
    elif num_labels is not None and num_labels != len(names):
        raise ConfigError(f"num_labels {num_labels} does not fit {len(names)} label names; pass one name for each label.")
    if not names:
        raise ConfigError(f"num_labels {num_labels} is below 1; use 1 for regression, 2 or more for classes.")
    if sorted(names) != list(range(len(names))):
        raise ConfigError(f"id2label numbers its labels {sorted(names)}, but they must run from 0 to {len(names) - 1} "
                          "without gaps.")
    if label2id is not None and {str(name): int(i) for name, i in label2id.items()} != {name: i for i, name in names.items()}:
        raise ConfigError(f"label2id {label2id} does not match id2label {names}; pass one of the two.")
    return names


def head_dropout_of(config: dict[str, Any], hidden_dropout: float) -> float:
    """transformers' rule: classifier_dropout when the checkpoint sets it, else the hidden dropout."""
    own = config.get("classifier_dropout")
    return hidden_dropout if own is None else own


def transformers_config(config: dict[str, Any], id2label: dict[int, str], problem_type: str | None) -> Any:
    """The backbone's transformers config with our labels: what Trainer's callbacks and the hub expect to find."""
    from transformers import AutoConfig, PretrainedConfig

    labels: dict[str, Any] = {"id2label": id2label, "label2id": {n: i for i, n in id2label.items()}, "problem_type": problem_type}
    plain = {k: v for k, v in config.items() if k not in ("model_type", "id2label", "label2id", "num_labels", "problem_type")}
    if config["model_type"] == "glm":        # transformers' class of that name is another architecture
        return PretrainedConfig(**plain, **labels)
    return AutoConfig.for_model(config["model_type"], **plain, **labels)
