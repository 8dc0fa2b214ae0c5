"""What a file would be in training, found out without training: the computation behind `ptv2 data check`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ptv2_engine.errors import DataError, LabelError
from ptv2_engine.tasks.base import Feature, Task, named_columns
from ptv2_engine.tasks.choices import ChoiceTask
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.features import plain_label
from ptv2_engine.tasks.spans import SpanTask, gold_answers
from ptv2_engine.tasks.tags import TagTask, spans

RARE = 0.01                   # of the labels: a class below this is pointed out
WHOLE = 1 << 20               # tokens: longer than any example, so that nothing is cut
# what P-Tuning v2 says of the prompt length, and what its published scripts use
PAPER = "(arXiv 2110.07602, section 3.3, prompt length)"
RULES = {
    "tags": (64, 128, f"hard sequence labelling does best with prompts of around 100 {PAPER}; the published settings for "
             "entities and roles use 11 to 224"),
    "span": (8, 32, f"simple tasks do best with prompts shorter than 20 {PAPER}; the published settings for question answering "
             "use 8 and 16"),
}
SIMPLE = (4, 20, f"simple classification does best with prompts shorter than 20 {PAPER}; the published settings go up to 40, for "
          "RTE to 128")


@dataclass(frozen=True)
class Problem:
    """row: from 1; 0 is the whole file."""

    source: str
    row: int
    what: str


@dataclass
class Report:
    """What `check` found.

    labels: how many of each: rows, or for tags entities by type. label_values: of a regression, min, p50, max and mean.
    lengths: p5, p50, p95 and max of a row in `unit` (tokens with [CLS] and [SEP], of the longest choice, as if nothing were cut;
    words of the text columns without a tokenizer). truncated: rows that lose tokens at max_seq_length; split: rows that become
    several pieces instead, `pieces` in all. None: not known without a tokenizer. prompt_length: (from, to), None where no prompt
    fits. conflicts: rows whose text stands elsewhere with another label. overlap: rows of the validation file that are in this
    one, None without one. examples: decoded as the model reads them.
    """

    source: str
    rows: int
    columns: list[str]
    kind: str
    model_task: str
    text_columns: list[str]
    label_column: str
    labels: dict[str, int] = field(default_factory=dict)
    label_values: dict[str, float] | None = None
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unit: str = "words"
    lengths: dict[str, int] = field(default_factory=dict)
    max_seq_length: int = 128
    truncated: int | None = None
    split: int | None = None
    pieces: int | None = None
    duplicates: int = 0
    conflicts: int = 0
    overlap: int | None = None
    examples: list[str] = field(default_factory=list)
    prompt_length: tuple[int, int] | None = None
    prompt_reason: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check(table: Table, task: Task, tokenizer: Any = None, max_seq_length: int = 128, validation: Table | None = None,
          positions: int | None = None, shown: int = 3) -> Report:
    """Look at a training table as training would.

    Arguments:
        tokenizer: None counts words, and decodes no examples.
        validation: rows that are checked as well, and looked for in the table.
        positions: tokens and prompt together that the backbone has positions for; None: no limit.
        shown: examples.
    """
    texts, label = columns_of(task, table)
    labelled = label in table.columns
    found = Report(table.source, len(table), table.columns, task.kind, task.model_task, texts, label,
                   max_seq_length=max_seq_length)
    found.problems = [Problem(table.source, row, what) for row, what in task.problems(table, labelled)]
    if validation is not None:
        found.problems += [Problem(validation.source, row, what) for row, what in
                           task.problems(validation, label in validation.columns)]
    if labelled and not found.problems:
        found.problems = [Problem(table.source, row, what) for row, what in task.training_problems(table)]
    bad = {problem.row for problem in found.problems if problem.source == table.source}
    numbers = [i for i in range(len(table)) if i + 1 not in bad]
    good = Table([table.rows[i] for i in numbers], table.source)
    _labels(found, task, good, label)
    _repeats(found, task, table, texts, label, validation)
    if isinstance(task, ChoiceTask):
        _equal_choices(found, task, table)
    longest = 0
    if tokenizer is None:
        _lengths(found, [_words(row, texts) for row in good.rows])
    else:
        found.unit = "tokens"
        longest = _tokens(found, task, good, numbers, tokenizer, labelled, shown)
    _prompt_length(found, longest, positions)
    return found


def columns_of(task: Task, table: Table) -> tuple[list[str], str]:
    """(columns with text, label column) of any task, from the names in its settings. A cloze pattern may read every column."""
    texts, label = named_columns(task)
    if not texts:
        texts = [c for c in table.columns if c not in (label, "idx", "id")
                 and any(isinstance(row.get(c), (str, list, dict)) for row in table.rows[:20])]
    return texts, label


def _labels(found: Report, task: Task, table: Table, label: str) -> None:
    """Counts, and warnings about one class and rare ones. Rows with problems are left out."""
    values = [row.get(label) for row in table.rows]
    if task.settings().get("label_kind") == "values":
        numbers = np.array([float(v) for v in values if v is not None])
        if len(numbers):
            found.label_values = {"min": float(numbers.min()), "p50": float(np.median(numbers)), "max": float(numbers.max()),
                                  "mean": float(numbers.mean())}
            if numbers.min() == numbers.max() and len(numbers) > 1:
                found.warnings.append(f"every value is {numbers[0]:g}; there is nothing to learn")
        return
    if isinstance(task, TagTask):
        what = "entities" if task.of_spans else "words"
        counts = Counter(name for tags in values if tags is not None for name in
                         ([name for name, _, _ in spans(tags)] if task.of_spans else map(str, tags)))
    elif isinstance(task, SpanTask):
        what, counts = "rows", Counter("answer" if gold_answers(v) else "no answer" for v in values)
    elif isinstance(task, ChoiceTask):
        what, counts = "rows", Counter("(none)" if (i := task.index(row)) is None else str(i) for row in table.rows)
    else:
        what, counts = "rows", Counter("(none)" if v is None else plain_label(v) for v in values)
        names = task.settings().get("names") or []
        counts.update({str(name): 0 for name in names})
    found.labels = dict(counts.most_common())
    total = sum(counts.values())
    if isinstance(task, SpanTask) or not total:
        return
    if len(+counts) == 1 and not isinstance(task, TagTask):
        found.warnings.append(f"one class: every label is {next(iter(+counts))!r}; a model learns nothing from this file")
    same: dict[str, list[str]] = defaultdict(list)
    for name in counts:
        same["".join(name.split()).casefold()].append(name)
    for alike in same.values():
        if len(alike) > 1:
            names = " and ".join(f"{name!r} ({counts[name]})" for name in alike)
            found.warnings.append(f"the labels {names} differ in case or spaces alone, and are learned as different ones")
    rare = [f"{name!r} ({count})" for name, count in counts.items() if count < RARE * total]
    if rare:
        more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
        found.warnings.append(f"below {RARE:.0%} of the {total} {what}: {', '.join(rare[:5])}{more}; they will hardly be learned")


def _repeats(found: Report, task: Task, table: Table, texts: list[str], label: str, validation: Table | None) -> None:
    first: dict[Hashable, str] = {}
    shown: Counter[Hashable] = Counter()
    conflicting: set[Hashable] = set()
    extra = getattr(task, "predicate_column", None)             # one sentence has several predicates
    keys = [*texts, *([extra] if extra else [])]
    for row in table.rows:
        key, value = _key(row, keys), str(row.get(label))
        shown[key] += 1
        if first.setdefault(key, value) != value:
            conflicting.add(key)
    found.duplicates = sum(n - 1 for n in shown.values())
    if not isinstance(task, SpanTask):                          # a question may have several answers
        found.conflicts = sum(shown[key] for key in conflicting)
    if found.conflicts:
        found.warnings.append(f"{found.conflicts} rows have the text of another row and another label; no model gets all right")
    if validation is not None:
        found.overlap = sum(_key(row, keys) in shown for row in validation.rows)
        if found.overlap:
            found.warnings.append(f"{found.overlap} of {len(validation)} rows of {validation.source} are in {table.source} as "
                                  "well; scores on them flatter the model")


def _equal_choices(found: Report, task: ChoiceTask, table: Table) -> None:
    choices = [[text for choice in task.choices(row) if (text := choice.strip())] for row in table.rows]
    numbers = [str(number) for number, texts in enumerate(choices, 1) if len(set(texts)) < len(texts)]
    if numbers:
        more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
        found.warnings.append(f"equal choices in {len(numbers)} rows ({', '.join(numbers[:10])}{more}); no model tells "
                              "them apart")


def _tokens(found: Report, task: Task, table: Table, numbers: list[int], tokenizer: Any, labelled: bool, shown: int) -> int:
    """Lengths, what max_seq_length costs, and examples; the longest feature in tokens. numbers: the file's row of each."""
    kept, features = _features(found, task, table, numbers, tokenizer, WHOLE, labelled)
    table, numbers = Table([table.rows[i] for i in kept], table.source), [numbers[i] for i in kept]
    full = np.zeros(len(table), dtype=np.int64)
    for feature in features:
        full[feature["row"]] = max(int(full[feature["row"]]), _length(feature))
    _lengths(found, full.tolist())
    if full.max(initial=0) > found.max_seq_length:
        kept, features = _features(found, task, table, numbers, tokenizer, found.max_seq_length, labelled)
        table, full = Table([table.rows[i] for i in kept], table.source), full[kept]
    pieces = Counter(feature["row"] for feature in features)
    found.split = sum(n > 1 for n in pieces.values())
    found.pieces = sum(n for n in pieces.values() if n > 1)
    found.truncated = sum(pieces[i] < 2 and int(full[i]) > found.max_seq_length for i in range(len(table)))
    for index in _spread(len(features), shown):
        found.examples.append(task.show(table, features, tokenizer, index))
    return max(map(_length, features), default=0)


def _features(found: Report, task: Task, table: Table, numbers: list[int], tokenizer: Any, limit: int,
              labelled: bool) -> tuple[list[int], list[Feature]]:
    """(indices of the rows that have features, the features). A row that only the tokenizer can refuse becomes a problem."""
    fine = list(range(len(table)))
    try:
        return fine, task.features(table, tokenizer, limit, labelled=labelled) if fine else []
    except (DataError, LabelError):
        fine.clear()
    for i, row in enumerate(table.rows):                        # which? One at a time, only where something is wrong
        try:
            task.features(Table([row], table.source), tokenizer, limit, labelled=labelled)
            fine.append(i)
        except (DataError, LabelError) as error:
            what = re.sub(r"^.*?\brow 1\b[:,]?\s*", "", str(error)).removeprefix(f"{table.source}: ").rstrip(".")
            found.problems.append(Problem(table.source, numbers[i] + 1, what))
    kept = Table([table.rows[i] for i in fine], table.source)
    return fine, task.features(kept, tokenizer, limit, labelled=labelled) if fine else []


def _prompt_length(found: Report, longest: int, positions: int | None) -> None:
    low, high, reason = RULES.get(found.kind, SIMPLE)
    room = None if positions is None else positions - longest
    if room is None or room >= high:
        found.prompt_length = (low, high)
    elif room >= 1:
        found.prompt_length = (min(low, room), room)
        reason += f"; the backbone's {positions} positions leave {room} beside {longest} tokens"
    else:
        reason += f"; but {longest} tokens leave no room in the backbone's {positions} positions"
        found.warnings.append(f"no prompt fits beside {longest} tokens in {positions} positions; lower --max_seq_length")
    found.prompt_reason = reason


def _lengths(found: Report, lengths: Sequence[int]) -> None:
    if lengths:
        middle = {f"p{q}": int(np.percentile(lengths, q, method="inverted_cdf")) for q in (5, 50, 95)}
        found.lengths = middle | {"max": max(lengths)}


def _length(feature: Feature) -> int:
    """Tokens; of a multiple choice, those of the longest."""
    ids = feature["input_ids"]
    return max(map(len, ids), default=0) if ids and isinstance(ids[0], (list, tuple)) else len(ids)


def _words(row: dict[str, Any], columns: Sequence[str]) -> int:
    """Words between blanks; words that are split already count as they are."""
    return sum(len(v) if isinstance(v, (list, tuple)) else len(str(v).split()) for v in map(row.get, columns) if v is not None)


def _key(row: dict[str, Any], columns: Sequence[str]) -> Hashable:
    return tuple(" ".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v).strip() for v in map(row.get, columns))


def _spread(count: int, shown: int) -> list[int]:
    """Up to `shown` indices over the whole range, the first and the last among them: files are often sorted by label."""
    shown = min(count, shown)
    return [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]
