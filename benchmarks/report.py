"""Result files -> Markdown tables: python benchmarks/report.py benchmarks/results/<device>/<date>-<commit>.json ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(record: dict[str, Any]) -> str:
    """One table; each peer as a multiple of our median, with the A/A row's ratio beside it."""
    lines = [f"Device {record['device']}, {record['date']}, commit {record['commit']}, torch {record['versions'].get('torch')}, "
             f"peft {record['versions'].get('peft')}.", f"`{record['command']}`", "",
             "| case | ours | peers, as a multiple of ours | A/A |", "|---|---|---|---|"]
    for row in record["rows"]:
        times = dict(row["times"])
        ours_name, ours = next(iter(times.items()))
        same = times.pop("A/A")["times_ours"]
        peers = ", ".join(f"{name} {v['times_ours']:.2f}x" for name, v in times.items() if name != ours_name)
        extra = next(
            (
                f", {row[k]:.0f} {unit}"
                for k, unit in (("tokens_per_s", "tokens/s"), ("gb_per_s", "GB/s"), ("gflop_per_s", "GFLOP/s"))
                if k in row
            ),
            "",
        )
        lines.append(f"| {row['case']} | {1000 * ours['median_s']:.2f} ms{extra} | {peers} | {same:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(table(json.loads(Path(name).read_text())), end="\n\n")
