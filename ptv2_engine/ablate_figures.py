"""The paper's figures (arXiv 2110.07602) from a grid's means: by prompted depth, by prompt length, by reparameterization.

Error bars are the standard deviation over the seeds. What varies besides the axis makes a line or a group of bars each; where
that is more than can be read, the best of the others is drawn and the figure says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]     # safe for the colour-blind
_MOST = len(COLOURS)


@dataclass(frozen=True)
class Point:
    """A cell's mean and standard deviation (None: one seed)."""

    varied: dict[str, str]
    mean: float
    std: float | None

    @property
    def bar(self) -> float:
        """The error bar's half; of one seed there is none to draw."""
        return float("nan") if self.std is None else self.std

    def others(self, flag: str) -> str:
        """What else varies, in words: the line that this point is on."""
        return ", ".join(f"{name} {value}" for name, value in self.varied.items() if name != flag)


def draw(folder: Path, points: Sequence[Point], metric: str, wanted: Sequence[str] = ("auto",)) -> list[Path]:
    """Write the figures that are wanted ("auto": all that the varied flags allow, else bars of the cells); the files written.

    Raises ImportError without matplotlib.
    """
    figures: dict[str, Callable[[Any, Sequence[Point], str], bool]] = {
        "depth": _depth, "length": _length, "reparameterization": _reparameterization, "cells": _cells}
    names = [n for n in figures if n != "cells"] if "auto" in wanted else [n for n in figures if n in wanted]
    written = [file for name in names if (file := _one(folder / f"{name}.png", figures[name], points, metric)) is not None]
    if "auto" in wanted and not written:
        written = [file for file in (_one(folder / "cells.png", _cells, points, metric),) if file is not None]
    return written


def _one(file: Path, paint: Callable[[Any, Sequence[Point], str], bool], points: Sequence[Point], metric: str) -> Path | None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e5e5e5", linewidth=0.8)
    if not paint(axes, points, metric):
        return None
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(file))
    return file


def span_of(layers: str) -> tuple[int, int] | None:
    """(first, last) of "17-24" or "5", layers from 1; None for other ways to say which layers have a prompt."""
    match = re.fullmatch(r"(\d+)-(\d+)", layers)
    return (int(match[1]), int(match[2])) if match else None


def depth_lines(points: Sequence[Point]) -> dict[str, list[tuple[int, Point]]]:
    """Line title -> (prompted layers k, point) by k: ascending is 1..k, descending is the top k. All layers are on both."""
    spans = [(span, p) for p in points if (span := span_of(p.varied.get("prompt_layers", "")))]
    top = max((last for (_, last), _ in spans), default=0)
    lines: dict[str, list[tuple[int, Point]]] = {}
    for (first, last), point in spans:
        for way, fits in (("ascending (layers 1-k)", first == 1), ("descending (the top k)", last == top)):
            if fits:
                rest = point.others("prompt_layers")
                lines.setdefault(way + (f", {rest}" if rest else ""), []).append((last - first + 1, point))
    return {title: sorted(line, key=lambda pair: pair[0]) for title, line in lines.items() if len(line) > 1}


def length_lines(points: Sequence[Point]) -> dict[str, list[tuple[int, Point]]]:
    lines: dict[str, list[tuple[int, Point]]] = {}
    for point in points:
        if point.varied.get("prompt_length", "").isdigit():
            lines.setdefault(point.others("prompt_length"), []).append((int(point.varied["prompt_length"]), point))
    return {title: sorted(line, key=lambda pair: pair[0]) for title, line in lines.items() if len(line) > 1}


def best_of(lines: dict[str, list[tuple[int, Point]]]) -> dict[str, list[tuple[int, Point]]]:
    """More lines than can be told apart become one: at each place the best of them."""
    if len(lines) <= _MOST:
        return lines
    best: dict[int, Point] = {}
    for line in lines.values():
        for x, point in line:
            if x not in best or point.mean > best[x].mean:
                best[x] = point
    return {f"best of {len(lines)} other settings": sorted(best.items())}


def _draw_lines(axes: Any, lines: dict[str, list[tuple[int, Point]]], metric: str) -> bool:
    lines = best_of(lines)
    for (title, line), colour in zip(lines.items(), COLOURS, strict=False):
        axes.errorbar([x for x, _ in line], [p.mean for _, p in line], yerr=[p.bar for _, p in line], label=title or None,
                      color=colour, marker="o", markersize=4, capsize=3, linewidth=1.6)
    places = sorted({x for line in lines.values() for x, _ in line})
    axes.set_xticks(places, [str(x) for x in places])
    axes.set_ylabel(metric)
    if any(lines):
        axes.legend(fontsize="small", frameon=False)
    return bool(lines)


def _depth(axes: Any, points: Sequence[Point], metric: str) -> bool:
    drawn = _draw_lines(axes, depth_lines(points), metric)
    axes.set_xlabel("prompted layers k")
    axes.set_title(f"{metric} by prompt depth")
    return drawn


def _length(axes: Any, points: Sequence[Point], metric: str) -> bool:
    axes.set_xscale("log", base=2)
    drawn = _draw_lines(axes, length_lines(points), metric)
    axes.minorticks_off()
    axes.set_xlabel("prompt length")
    axes.set_title(f"{metric} by prompt length")
    return drawn


def _reparameterization(axes: Any, points: Sequence[Point], metric: str) -> bool:
    """Groups of bars: a bar a reparameterization, a group what else varies."""
    bars: dict[str, dict[str, Point]] = {}
    for point in points:
        if "reparameterization" in point.varied:
            bars.setdefault(point.varied["reparameterization"], {})[point.others("reparameterization")] = point
    groups = list(dict.fromkeys(group for bar in bars.values() for group in bar))
    if len(bars) < 2:
        return False
    width = 0.8 / len(bars)
    for i, ((title, bar), colour) in enumerate(zip(bars.items(), COLOURS, strict=False)):
        places = [groups.index(group) + (i - (len(bars) - 1) / 2) * width for group in bar]
        axes.bar(places, [p.mean for p in bar.values()], width, yerr=[p.bar for p in bar.values()], label=title,
                 color=colour, capsize=3)
    axes.set_xticks(range(len(groups)), groups, rotation=30 if sum(map(len, groups)) > 60 else 0, fontsize="small")
    axes.grid(visible=False, axis="x")
    begins = _from_near_the_lowest(axes.set_ylim, points)
    axes.set_ylabel(f"{metric}{begins}")
    axes.legend(title="reparameterization", fontsize="small", frameon=False)
    axes.set_title(f"{metric} by reparameterization")
    return True


def _cells(axes: Any, points: Sequence[Point], metric: str) -> bool:
    """A bar a cell, the first on top."""
    titles = [point.others("") or "base" for point in points]
    axes.figure.set_size_inches(8, 1.2 + 0.35 * len(points))
    axes.barh(range(len(points)), [p.mean for p in points], xerr=[p.bar for p in points], color=COLOURS[0], capsize=3)
    axes.set_yticks(range(len(points)), titles, fontsize="small")
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    begins = _from_near_the_lowest(axes.set_xlim, points)
    axes.set_xlabel(f"{metric}{begins}")
    return bool(points)


def _from_near_the_lowest(set_limits: Callable[..., Any], points: Sequence[Point]) -> str:
    """Bars of nearly equal height say nothing from zero; the axis begins a half of their spread below the lowest, and says so."""
    low, high = min(p.mean - (p.std or 0.0) for p in points), max(p.mean + (p.std or 0.0) for p in points)
    if 0 < low < high:
        begin = max(low - (high - low) / 2, 0.0)
        set_limits(begin, high + (high - low) / 10)
        return " (the axis does not begin at 0)" if begin > 0 else ""
    return ""
