"""Measured rows -> tables and pictures; no figure in docs/performance.md is typed by hand.

    python benchmarks/report.py show FILE... [--output FOLDER]    Markdown of result files, with a roofline PNG each
    python benchmarks/report.py docs                              docs/performance.md between its marks, and its pictures
    python benchmarks/report.py check                             whether the docs are what the committed results make
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS, DOCS = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs" / "performance.md"
MARKS = ("<!-- report.py: begin -->", "<!-- report.py: end -->")
OPS = {"train_step": "Training steps", "trainer": "The Trainer over the raw replay", "prefix_attention": "Prefix attention",
       "disentangled_attention": "Disentangled attention",
       **dict.fromkeys(("add_norm", "add_norm_sum", "embedding", "dropout", "rotary"), "Row kernels"),
       **dict.fromkeys(("linear_gelu", "linear_geglu", "frozen_linear", "lm_head"), "Linear layers")}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
Row = dict[str, Any]


def op_of(row: Row) -> str:
    """The op, also of rows that were written before they named it."""
    start = row["case"].replace("train step", "train_step").split()[0]
    return row.get("op", start if start in OPS else "frozen_linear" if start.startswith("frozen") else "train_step")


def time_of(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def speed_of(row: Row) -> str:
    """Tokens a second of whole steps; of kernels how near they come to the machine's limit."""
    if op_of(row) in ("train_step", "trainer") and "tokens_per_s" in row:
        parts = [f"{row['tokens_per_s']:,.0f} tokens/s"]
        if "batch" in row and "tokens" in row:
            parts.append(f"{row['tokens_per_s'] * row['batch'] / row['tokens']:,.1f} sequences/s")
        if "matrix_parameters" in row and "rate" in row:
            parts.append(f"{row['tokens_per_s'] * 4 * row['matrix_parameters'] / row['rate']:.0%} of matmul")
        if "peak_memory_bytes" in row:
            sizes = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in row["peak_memory_bytes"].items())
            parts.append(f"peak GiB: {sizes}")
        return ", ".join(parts)
    return f"{row['of_limit']:.0%} of {row['limited_by']}" if "of_limit" in row else ""


def peers_of(row: Row) -> str:
    ours = next(iter(row["times"]))
    parts = [f"{name} {v['times_ours']:.2f}x" for name, v in row["times"].items() if name not in (ours, "A/A")]
    if launched := [name for name in row.get("not_captured", []) if name in row["times"]]:
        parts.append(f"launched one by one, no graph: {' and '.join(launched)}")
    parts += [f"{name}: not run ({reason.split(':')[0]})" for name, reason in row.get("skipped", {}).items()]
    if "trainer_step_s" in row:
        parts.append(f"Trainer {row['trainer_step_s'] / row['times'][ours]['median_s']:.3f}x")
    return ", ".join(parts)


def line_of(row: Row) -> str:
    ours = next(iter(row["times"].values()))
    spread = f"{time_of(ours['median_s'])} ({time_of(ours['p20_s'])} to {time_of(ours['p80_s'])})"
    return f"| {row['case']} | {spread} | {speed_of(row)} | {peers_of(row)} | {row['times']['A/A']['times_ours']:.2f} |"


def header(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items() if value)
    return f"{record['device']}, {record['date']}, commit {record['commit']}, {versions}; `{record['command']}`"


def limits_line(record: dict[str, Any]) -> str:
    found = []
    for device, limit in record.get("limits", {}).items():
        rates = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in limit["matmul_flops_per_s"].items())
        found.append(f"{device}: copy {limit['copy_bytes_per_s'] / 1e9:,.0f} GB/s, matrix products {rates}")
    return f"Limits measured in the same run: {'; '.join(found)}." if found else ""


def rate_of(record: dict[str, Any], row: Row) -> float | None:
    """Flops a second of a large matrix product where the row ran, in its dtype; None in records without limits."""
    limit = record.get("limits", {}).get(row.get("device"), {"matmul_flops_per_s": {}})
    return limit["matmul_flops_per_s"].get(DTYPES.get(row.get("dtype", "")))


def table(record: dict[str, Any]) -> str:
    """A record's rows as Markdown, a table for each group of ops; peers as multiples of our median."""
    parts = [header(record), limits_line(record)]
    rows = [row | ({"rate": rate} if (rate := rate_of(record, row)) else {}) for row in record["rows"]]
    for title in dict.fromkeys(OPS.values()):
        chosen = [row for row in rows if OPS.get(op_of(row)) == title]
        if chosen:
            parts.append("\n".join([f"| {title} | ours: median (20 % to 80 %) | | peers, as a multiple of ours | A/A |",
                                    "|---|---|---|---|---|", *map(line_of, chosen)]))
    scaling = [row for row in rows if op_of(row) == "scaling"]
    if scaling:
        listed = lambda values, form: ", ".join(format(value, form) for value in values)
        lines = [f"| {row['axis']} | {listed(row['values'], 'd')} | {listed(row['milliseconds'], '.1f')} | {row['slope']:.4g} "
                 f"{row['unit']} | {row['r2']:.3f} |" for row in scaling]
        parts.append("\n".join([f"| A step of {scaling[0]['model']} by | points | ms | slope | R^2 |", "|---|---|---|---|---|",
                                *lines]))
    return "\n\n".join(part for part in parts if part)


def points_of(record: dict[str, Any]) -> list[Row]:
    """The rows that know their bytes, their flops and the limits of where they ran."""
    return [row for row in record["rows"]
            if row.get("bytes") and row.get("flops") and row.get("device") in record.get("limits", {})]


def roofline(record: dict[str, Any], file: Path) -> bool:
    """Each kernel's rate by its flops a byte, under the roof of this machine's copy and products. False: nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = points_of(record)
    if not points:
        return False
    figure, axes = plt.subplots(figsize=(8, 5.5))
    devices = sorted({(row["device"], row["dtype"]) for row in points})
    markers = dict(zip(devices, "osD^vP", strict=False))
    for device, dtype in devices:
        limit = record["limits"][device]
        chosen = [row for row in points if (row["device"], row["dtype"]) == (device, dtype)]
        rate = rate_of(record, chosen[0])
        intensity = [row["flops"] / row["bytes"] for row in chosen]
        achieved = [row["flops"] / next(iter(row["times"].values()))["median_s"] / 1e9 for row in chosen]
        low, high = min(1.0, *intensity) / 2, max(1000.0, *intensity) * 2
        grid = [low * (high / low) ** (i / 100) for i in range(101)]
        roof = [min(limit["copy_bytes_per_s"] * x, rate or float("inf")) / 1e9 for x in grid]
        line, = axes.loglog(grid, roof, label=f"{device} {dtype}: measured copy and matrix products")
        axes.loglog(intensity, achieved, markers[device, dtype], color=line.get_color(), markerfacecolor="none",
                    label=f"{device} {dtype}: kernels")
    axes.set_xlabel("flops a byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"Kernels on {record['device']}, {record['date']}")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return True


def newest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of one device, newest first, each with the cases that no newer one has; those left empty are dropped."""
    seen: set[str] = set()
    kept = []
    for record in sorted(records, key=lambda r: r.get("time", r["date"]), reverse=True):
        rows = [row for row in record["rows"] if row["case"] not in seen]
        seen |= {row["case"] for row in rows}
        if rows:
            kept.append(record | {"rows": rows})
    return kept


def generated(results: Path, pictures: Path | None) -> str:
    """What docs/performance.md shows: for each device its records; pictures: where their PNGs go, None to draw none."""
    parts = []
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        records = [json.loads(f.read_text()) for f in sorted(folder.glob("20*.json"))]
        for record in newest(records):
            parts.append(table(record))
            name = f"roofline-{folder.name}-{record['date']}-{record['commit']}.png"
            if roofline(record, pictures / name) if pictures is not None else points_of(record):
                parts.append(f"![roofline]({name})")
    return "\n\n".join(parts)


def docs_text(results: Path = RESULTS, docs: Path = DOCS, pictures: Path | None = None) -> str:
    text = docs.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    return f"{text[:begin + len(MARKS[0])]}\n\n{generated(results, pictures)}\n\n{text[end:]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["show", "docs", "check"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, help="a folder for report.md and roofline PNGs")
    args = parser.parse_args(arguments)
    if args.what == "docs":
        DOCS.write_text(docs_text(pictures=DOCS.parent), encoding="utf-8")
        return 0
    if args.what == "check":
        same = docs_text() == DOCS.read_text(encoding="utf-8")
        print("docs/performance.md is what the results make" if same else "run: python benchmarks/report.py docs")
        return 0 if same else 1
    texts = []
    for file in args.files:
        record = json.loads(file.read_text())
        texts.append(table(record))
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            if roofline(record, args.output / f"roofline-{file.stem}.png"):
                texts.append(f"![roofline](roofline-{file.stem}.png)")
    print("\n\n".join(texts))
    if args.output is not None:
        (args.output / "report.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
