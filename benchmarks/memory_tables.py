"""Results of memory_profile.py and memory_accuracy.py -> the tables and the picture of docs/memory-at-10b.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ptv2_engine.memory.planner import CUDA_CONTEXT, Plan
from ptv2_engine.memory.report import draw, size

MARKER = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.S)


def rewrite(file: Path, results: Path) -> None:
    """Put each table between its markers; the run that a table comes from is named under it."""
    plan = json.loads((results / "memory-plan-glm-10b.json").read_text())
    profiles = [json.loads(f.read_text()) for f in sorted(results.glob("*/memory-profile-*.json"))]
    tables = {"planned": planned(plan), "lengths": by_length(plan), "most": most(plan), "peers": peers(plan),
              "measured": "\n".join(measured(profile) for profile in profiles)}
    if (accuracy := results / "memory-accuracy.json").is_file():
        tables["accuracy"] = accuracies(json.loads(accuracy.read_text()))
    file.write_text(MARKER.sub(lambda m: f"{m[1]}\n{tables[m[2]]}\n{m[3]}" if m[2] in tables else m[0], file.read_text()))
    picture(file.with_suffix(".png"), plan)
    print(f"written: {file}, {file.with_suffix('.png')}")


def source(record: dict[str, Any]) -> str:
    device = "" if record.get("device", "none") == "none" else f"{record['device']}, "
    return f"{device}{record['date']}, commit {record['commit']}, torch {record['torch']}; `{record['command']}`\n"


def grid(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]) + "\n"


def weights(row: dict[str, Any]) -> str:
    return (row["frozen_dtype"] or row["dtype"].replace("bfloat16", "bf16")) + (", streamed" if row["stream_weights"] else "")


def pick(plan: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in plan["rows"] if all(row[k] == v for k, v in wanted.items())]


def planned(plan: dict[str, Any]) -> str:
    rows = pick(plan, seq_len=512, prompt_length=128)
    kinds = list(dict.fromkeys(map(weights, rows)))
    lines = [[kind, *(size(row["peak"]) for row in rows if weights(row) == kind),
              size(next(row["host"] for row in rows if weights(row) == kind))] for kind in kinds]
    return grid(["frozen weights", "exact", "lean", "minimal", "in host memory"], lines) + "\n" + source(plan)


def by_length(plan: dict[str, Any]) -> str:
    rows = pick(plan, memory="exact", frozen_dtype=None, stream_weights=None)
    lengths = sorted({row["seq_len"] for row in rows})
    return grid(["exact, bf16", *(f"{plan['tokens'] // S} x {S} tokens" for S in lengths)],
                [[f"P = {P}", *(size(row["peak"]) for S in lengths for row in rows
                                if (row["seq_len"], row["prompt_length"]) == (S, P))]
                 for P in sorted({row["prompt_length"] for row in rows})])


def most(plan: dict[str, Any]) -> str:
    rows = plan["most"]
    kinds = list(dict.fromkeys(map(weights, rows)))
    return grid(["frozen weights", "exact", "lean", "minimal"],
                [[kind, *(f"{row['largest_batch'] * row['seq_len']:,}" for row in rows if weights(row) == kind)]
                 for kind in kinds])


def peers(plan: dict[str, Any]) -> str:
    exact = pick(plan, seq_len=512, prompt_length=128, frozen_dtype=None, stream_weights=None)
    lines = [[f"P-Tuning v2, {row['memory']}", size(row["parts"]["saved activations"]), size(row["peak"])] for row in exact]
    lines += [[p["title"], size(p["parts"]["saved activations"]), size(p["peak"])] if "title" in p else
              [p["peer"], p["why_not"], ""] for p in plan["peers"]]
    return grid(["planned", "saved activations", "peak"], lines)


def measured(profile: dict[str, Any]) -> str:
    """One device's table: predicted beside measured."""
    def cells(row: dict[str, Any]) -> list[str]:
        name = [row["memory"], weights(row), f"{row['tokens']:,}", size(row["predicted"])]
        if "measured" not in row:
            return [*name, row["why_not"], "", "", ""]
        off = f"{100 * (row['predicted'] / row['measured'] - 1):+.2f} %"
        speed = f"{row['tokens_per_s']:.0f}" if "tokens_per_s" in row else "-"
        return [*name, size(row["measured"]), off, speed, f"{100 * row['hidden']:.0f} %" if "hidden" in row else "-"]

    head = ["memory", "frozen weights", "tokens", "predicted", "measured", "predicted - measured", "tokens/s", "copies hidden"]
    lines = [cells(row) for row in profile["rows"]]
    lines += [[p["peer"], "-", "-", "-", size(p["measured"]) if "measured" in p else p["why_not"], "-",
               f"{p['tokens_per_s']:.0f}" if "tokens_per_s" in p else "-", "-"] for p in profile["peers"]]
    return f"{profile['model']} on {profile['device']}:\n\n" + grid(head, lines) + "\n" + source(profile)


def accuracies(record: dict[str, Any]) -> str:
    titles = [name for name in next(iter(record["rows"].values())) if name != "gradient error"]

    def spread(row: dict[str, Any], title: str) -> str:
        return f"{100 * row[title][0]:.1f} +- {100 * row[title][1]:.1f}" if title in row else "not trained"

    return grid(["", "error of the first gradient", *titles],
                [[name, f"{100 * row['gradient error']:.1f} %", *(spread(row, title) for title in titles)]
                 for name, row in record["rows"].items()]) + "\n" + source(record)


def picture(file: Path, plan: dict[str, Any]) -> None:
    """Stacked bars: every policy and dtype at 512 tokens a sequence, and the peers."""
    def bar(title: str, row: dict[str, Any]) -> Plan:
        return Plan(title, row["parts"], [], 0, plan["tokens"], 0.0, CUDA_CONTEXT)

    rows = pick(plan, seq_len=512, prompt_length=128)
    bars = [bar(f"{row['memory']}, {weights(row)}", row) for row in rows]
    bars += [bar(p["title"].replace(", on a BERT of these sizes", ""), p) for p in plan["peers"] if "title" in p]
    draw(file, bars, f"{plan['model']}: a training step of {plan['tokens']:,} tokens, prompt 128", plan["limit"])
