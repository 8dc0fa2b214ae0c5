"""Named entities and semantic roles: CoNLL-2003, CoNLL-2004, OntoNotes 5.0, CoNLL-2005, CoNLL-2012.

Local files are read as the published folders have them; hub rows, which differ from mirror to mirror, become the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.base import Benchmark
from ptv2_engine.tasks.conll import is_tag
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.features import in_order
from ptv2_engine.tasks.tags import TagTask

_WORDS, _TAGS = ("words", "tokens"), ("tags", "ner_tags")
# tner/ontonotes5 has numbers for tags, in this order
ONTONOTES = ["O", "B-CARDINAL", "B-DATE", "I-DATE", "B-PERSON", "I-PERSON", "B-NORP", "B-GPE", "I-GPE", "B-LAW", "I-LAW", "B-ORG",
             "I-ORG", "B-PERCENT", "I-PERCENT", "B-ORDINAL", "B-MONEY", "I-MONEY", "B-WORK_OF_ART", "I-WORK_OF_ART", "B-FAC",
             "B-TIME", "I-CARDINAL", "B-LOC", "B-QUANTITY", "I-QUANTITY", "I-NORP", "I-LOC", "B-PRODUCT", "I-TIME", "B-EVENT",
             "I-EVENT", "I-FAC", "B-LANGUAGE", "I-PRODUCT", "I-ORDINAL", "I-LANGUAGE"]
CONLL2003 = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]


def _both(types: str, only_first: str = "") -> list[str]:
    """The tags of span types; `only_first`: types of one word."""
    return ["O", *(f"B-{t}" for t in (types + " " + only_first).split()), *(f"I-{t}" for t in types.split())]


CONLL2004 = _both("Peop Org Loc Other")
# the published label lists: dev and test have roles that a training file may lack
CONLL2005 = _both(
    """A0 A1 A2 A3 A4 A5 AA AM AM-ADV AM-CAU AM-DIR AM-DIS AM-EXT AM-LOC AM-MNR AM-MOD AM-NEG AM-PNC AM-PRD AM-REC AM-TM AM-TMP
    C-A0 C-A1 C-A2 C-A3 C-A4 C-A5 C-AM-ADV C-AM-CAU C-AM-DIR C-AM-DIS C-AM-EXT C-AM-LOC C-AM-MNR C-AM-PNC C-AM-TMP C-V R-A0 R-A1
    R-A2 R-A3 R-A4 R-AM-ADV R-AM-DIR R-AM-EXT R-AM-LOC R-AM-MNR R-AM-PNC R-AM-TMP V""",
    only_first="C-AM-NEG R-AA R-AM-CAU")
CONLL2012 = _both(
    """ARG0 ARG1 ARG2 ARG3 ARG4 ARG5 ARGA ARGM-ADJ ARGM-ADV ARGM-CAU ARGM-COM ARGM-DIR ARGM-DIS ARGM-DSP ARGM-EXT ARGM-GOL
    ARGM-LOC ARGM-MNR ARGM-MOD ARGM-NEG ARGM-PNC ARGM-PRD ARGM-PRP ARGM-REC ARGM-TMP C-ARG0 C-ARG1 C-ARG2 C-ARG3 C-ARG4 C-ARGM-ADV
    C-ARGM-CAU C-ARGM-DSP C-ARGM-EXT C-ARGM-LOC C-ARGM-MNR C-ARGM-MOD C-ARGM-PRP C-ARGM-TMP R-ARG0 R-ARG1 R-ARG2 R-ARG3 R-ARG4
    R-ARGM-ADV R-ARGM-CAU R-ARGM-COM R-ARGM-DIR R-ARGM-EXT R-ARGM-GOL R-ARGM-LOC R-ARGM-MNR R-ARGM-PRD R-ARGM-PRP R-ARGM-TMP""",
    only_first="ARGM-LVB ARGM-PRR ARGM-PRX R-ARG5 V")


def entity_rows(table: Table, names: Sequence[str]) -> Table:
    """Rows {"words", "tags"} of {"words" or "tokens", "tags" or "ner_tags"}, tags or numbers of `names`, or of {"tokens",
    "entities": [{"type", "start", "end"}]} (in words, the end outside). Empty sentences are left out; a row may lack tags.

    Raises DataError naming the row.
    """
    rows = []
    for number, row in enumerate(table.rows, start=1):
        words = _first(row, _WORDS, table.source, number)
        tags: list[str] | None = None
        if row.get("entities") is not None and not any(name in row for name in _TAGS):
            tags = _tags_of(row["entities"], len(words), f"{table.source}: row {number}")
        elif any(row.get(name) is not None for name in _TAGS):
            tags = _named(_first(row, _TAGS, table.source, number), names, f"{table.source}: row {number}")
        if words:
            rows.append({"words": words} | ({} if tags is None else {"tags": tags}))
    return Table(rows, table.source)


def role_rows(table: Table) -> Table:
    """Rows {"words", "predicate" (index from 0), "tags"}, one a predicate: such rows as they are, and documents {"sentences":
    [{"words", "srl_frames": [{"verb", "frames"}]}]} laid flat. Raises DataError naming the row."""
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(table.rows, start=1):
        if "sentences" not in row:
            rows.append({"words": _first(row, _WORDS, table.source, number)}
                        | {name: row[name] for name in ("predicate", "tags") if name in row})
            continue
        for sentence in row["sentences"]:
            for frame in sentence["srl_frames"]:
                words, tags = list(sentence["words"]), [str(tag) for tag in frame["frames"]]
                if "B-V" not in tags and frame["verb"] not in words:
                    raise DataError(f"{table.source}: row {number}: the predicate {frame['verb']!r} is not a word of "
                                    f"{' '.join(words)[:60]!r}; correct the row.")
                at = tags.index("B-V") if "B-V" in tags else words.index(frame["verb"])
                rows.append({"words": words, "predicate": at, "tags": tags})
    return Table(rows, table.source)


def _first(row: Mapping[str, Any], names: Sequence[str], source: str, number: int) -> list[Any]:
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise DataError(f"{source}: row {number} has no {' or '.join(map(repr, names))}; it has {', '.join(map(repr, row))}.")
    return list(row[name])


def _named(tags: Sequence[Any], names: Sequence[str], where: str) -> list[str]:
    wrong = [tag for tag in tags if not isinstance(tag, str) and not 0 <= int(tag) < len(names)]
    if wrong:
        raise DataError(f"{where} has the tag {wrong[0]}, but there are {len(names)} tags, from 0; correct the row.")
    return [tag if isinstance(tag, str) else names[int(tag)] for tag in tags]


def _tags_of(entities: Sequence[Mapping[str, Any]], num_words: int, where: str) -> list[str]:
    tags = ["O"] * num_words
    for entity in entities:
        start, end = int(entity["start"]), int(entity["end"])
        if not 0 <= start < end <= num_words:
            raise DataError(f"{where} has an entity of the words {start} to {end}, but there are {num_words}; correct the row.")
        tags[start:end] = [f"B-{entity['type']}"] + [f"I-{entity['type']}"] * (end - start - 1)
    return tags


def _entities(name: str, hub: tuple[str, ...], names: Sequence[str],
              files: Mapping[str, tuple[str, ...]] | None = None) -> Benchmark:
    def make(table: Table, template: int) -> TagTask:
        """The published types, in any scheme of prefixes. Raises DataError for others: the files are another data set's."""
        task, types = _task(table, names, None), {_type(tag) for tag in names}
        if unknown := {_type(tag) for tag in task.names} - types:
            raise DataError(f"{table.source} has entities of the types {', '.join(sorted(unknown))}, but {name} has "
                            f"{', '.join(sorted(types - {'O'}))}; give {name}'s own files, or others by --train_file.")
        return task

    return Benchmark(name, hub, make, files=files or {},
                     rows=lambda table, template: entity_rows(table, names))


def _roles(name: str, hub: tuple[str, ...], names: Sequence[str], files: Mapping[str, tuple[str, ...]]) -> Benchmark:
    return Benchmark(name, hub, lambda table, template: _task(table, names, "predicate"), files=files,
                     splits={split: split for split in files}, rows=lambda table, template: role_rows(table))


def _task(table: Table, names: Sequence[str], predicate: str | None) -> TagTask:
    """The published tags, and those of a training table of another version."""
    found = TagTask.infer(table, "words", "tags", predicate)
    return TagTask("words", "tags", in_order({*names, *found.names}), predicate)


def _type(tag: str) -> str:
    return tag[2:] if is_tag(tag) and tag != "O" else tag


def _stems(*prefixes: str, **ends: str) -> dict[str, tuple[str, ...]]:
    return {split: tuple(f"{prefix}.{end}" for prefix in prefixes) for split, end in ends.items()}


NER: dict[str, Benchmark] = {
    "conll2003": _entities("conll2003", ("lhoestq/conll2003",), CONLL2003),
    # the hub's split (922 / 231 / 288) is another than the published one (910 / 243 / 288), which the files have
    "conll2004": _entities("conll2004", ("DFKI-SLT/conll04",), CONLL2004),
    "ontonotes": _entities("ontonotes", ("tner/ontonotes5",), ONTONOTES,
                           {"train": ("train.sd",), "validation": ("dev.sd",), "test": ("test.sd",)}),
}
SRL: dict[str, Benchmark] = {
    # the text is the Penn Treebank's, so there is no copy on the hub: files only
    "conll2005": _roles("conll2005", (), CONLL2005, _stems("conll05", "conll2005", train="train", validation="devel",
                                                           test="test.wsj", test_brown="test.brown")),
    "conll2012": _roles("conll2012", ("ontonotes/conll2012_ontonotesv5", "english_v4"), CONLL2012,
                        _stems("conll2012", "conll12", train="train", validation="devel", test="test")),
}
