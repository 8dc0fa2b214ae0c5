"""The paper's figures (arXiv 2110.07602) from a grid's means: by prompted depth, by prompt length, by reparameterization.

Error bars are the standard deviation over the seeds. What varies besides the axis makes a line or a group of bars each; where
that is more than can be read, the best of the others is drawn and the figure says so. Markers, dashes and hatches tell in print
without colours what the colours tell on a screen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]     # safe for the colour-blind
MARKERS, DASHES, HATCHES = "os^DvPX*", ("-", "--", "-.", ":"), ("", "///", "...", "xx")
_MOST = len(COLOURS)
_WIDTH = 7.0                           # inches of a figure, unless its bars need more
_LETTER = 0.08                         # inches that a letter of a label takes, at the most
Lines = dict[str, list[tuple[int, "Point"]]]       # title -> (place on the axis, point), by place


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


def draw(folder: Path, points: Sequence[Point], metric: str, wanted: Sequence[str] = ("auto",), *, of: str = "",
         where: str = "") -> list[Path]:
    """Write the figures that are wanted ("auto": all that the varied flags allow, else bars of the cells); the files written.

    of: data set and backbone, for the titles. where: what the metric was measured on. Raises ImportError without matplotlib.
    """
    figures: dict[str, tuple[str, Callable[[Any, Sequence[Point], str], bool]]] = {
        "depth": ("by prompt depth", _depth), "length": ("by prompt length", _length),
        "reparameterization": ("by reparameterization", _reparameterization), "cells": ("of each cell", _cells)}
    bars = "error bars: standard deviation over the seeds" if any(point.std is not None for point in points) else ""
    about = "; ".join(filter(None, (where, bars)))
    written: list[Path] = []
    for name, (title, paint) in figures.items():
        if name in wanted or "auto" in wanted and (name != "cells" or not written):
            file = folder / f"{name}.png"
            if _one(file, paint, points, metric, f"{of}: {metric} {title}".removeprefix(": "), about):
                written.append(file)
    return written


def better(metric: str) -> Callable[..., Any]:
    """min for what is better when it is smaller, else max."""
    return min if metric in ("loss", "mse", "runtime") else max


def _one(file: Path, paint: Callable[[Any, Sequence[Point], str], bool], points: Sequence[Point], metric: str, title: str,
         about: str) -> bool:
    """Whether there was something to paint."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 4.5), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.grid(color="#e5e5e5", linewidth=0.8)
    if not paint(axes, points, metric):
        return False
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(filter(None, (title, about))), fontsize="medium")
    handles, labels = axes.get_legend_handles_labels()
    if labels:                                        # below the axes, where it hides nothing
        width, height = figure.get_size_inches()
        columns = max(min(int(width / (_LETTER * max(map(len, labels)) + 0.6)), len(labels)), 1)
        figure.set_size_inches(width, height + 0.2 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small", frameon=False, handlelength=3)
    FigureCanvasAgg(figure).print_png(str(file))
    return True


def span_of(layers: str) -> tuple[int, int] | None:
    """(first, last) of "17-24", layers from 1; None for other ways to say which layers have a prompt."""
    match = re.fullmatch(r"(\d+)-(\d+)", layers)
    return (int(match[1]), int(match[2])) if match else None


def depth_lines(points: Sequence[Point]) -> Lines:
    """By prompted layers k: ascending is 1..k, descending is the top k (also as the number k). All layers are on both."""
    layers = [(point.varied.get("prompt_layers", ""), point) for point in points]
    spans = [(span, point) for words, point in layers if (span := span_of(words))]
    top = max((last for (_, last), _ in spans), default=0)
    up, down = "ascending (layers 1-k)", "descending (the top k)"
    places = [(way, last - first + 1, point) for (first, last), point in spans for way, fits in
              ((up, first == 1), (down, last == top)) if fits]
    places += [(down, int(words), point) for words, point in layers if words.isdigit()]
    lines: Lines = {}
    for way, k, point in places:
        rest = point.others("prompt_layers")
        lines.setdefault(way + (f", {rest}" if rest else ""), []).append((k, point))
    return _by_place(lines)


def length_lines(points: Sequence[Point]) -> Lines:
    lines: Lines = {}
    for point in points:
        if point.varied.get("prompt_length", "").isdigit():
            lines.setdefault(point.others("prompt_length"), []).append((int(point.varied["prompt_length"]), point))
    return _by_place(lines)


def _by_place(lines: Lines) -> Lines:
    """A single point is no line."""
    return {title: sorted(line, key=lambda pair: pair[0]) for title, line in lines.items() if len(line) > 1}


def best_of(lines: Lines, metric: str) -> Lines:
    """More lines than can be told apart become one: at each place the best of them."""
    if len(lines) <= _MOST:
        return lines
    found: dict[int, list[Point]] = {}
    for line in lines.values():
        for x, point in line:
            found.setdefault(x, []).append(point)
    best = [(x, _best(there, metric)) for x, there in sorted(found.items())]
    return {f"best of {len(lines)} other settings": best}


def _best(points: Sequence[Point], metric: str) -> Point:
    point: Point = better(metric)(points, key=lambda p: p.mean)
    return point


def _draw_lines(axes: Any, lines: Lines, metric: str) -> bool:
    if not lines:
        return False
    lines = best_of(lines, metric)
    places = sorted({x for line in lines.values() for x, _ in line})
    scale, back = (math.log2, lambda at: 2.0 ** at) if axes.get_xscale() == "log" else (float, float)
    step = (scale(places[-1]) - scale(places[0])) / 120                # side by side, or error bars would hide each other
    for i, ((title, line), colour) in enumerate(zip(lines.items(), COLOURS, strict=False)):
        shift = (i - (len(lines) - 1) / 2) * step
        axes.errorbar([back(scale(x) + shift) for x, _ in line], [p.mean for _, p in line], yerr=[p.bar for _, p in line],
                      label=title or None, color=colour, capsize=3, marker=MARKERS[i], linestyle=DASHES[i % len(DASHES)],
                      markersize=5, linewidth=1.6)
    axes.set_xticks(places, _with_room(places, scale))
    axes.set_ylabel(metric)
    return True


def _with_room(places: Sequence[int], scale: Callable[[int], float]) -> list[str]:
    """Labels of ticks; none for a tick that is nearer than a 25th of the axis to the last one that has a label."""
    labels: list[str] = []
    last, least = -math.inf, (scale(places[-1]) - scale(places[0])) / 25
    for x in places:
        room = scale(x) - last >= least
        labels.append(str(x) if room else "")
        last = scale(x) if room else last
    return labels


def _depth(axes: Any, points: Sequence[Point], metric: str) -> bool:
    axes.set_xlabel("prompted layers k")
    return _draw_lines(axes, depth_lines(points), metric)


def _length(axes: Any, points: Sequence[Point], metric: str) -> bool:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("prompt length (key/value pairs a layer)")
    drawn = _draw_lines(axes, length_lines(points), metric)
    axes.minorticks_off()
    return drawn


def _reparameterization(axes: Any, points: Sequence[Point], metric: str) -> bool:
    """Groups of bars: a bar a reparameterization, a group what else varies."""
    bars: dict[str, dict[str, Point]] = {}
    for point in points:
        if "reparameterization" in point.varied:
            bars.setdefault(point.varied["reparameterization"], {})[point.others("reparameterization")] = point
    if len(bars) < 2:
        return False
    groups = list(dict.fromkeys(group for bar in bars.values() for group in bar))
    if len(groups) > _MOST:
        groups = [f"best of {len(groups)} other settings"]
        bars = {title: {groups[0]: _best(list(bar.values()), metric)} for title, bar in bars.items()}
    shown = [point for bar in bars.values() for point in bar.values()]
    width = min(0.8 / len(bars), 0.25)
    for i, ((title, bar), colour) in enumerate(zip(bars.items(), COLOURS, strict=False)):
        places = [groups.index(group) + (i - (len(bars) - 1) / 2) * width for group in bar]
        axes.bar(places, [p.mean for p in bar.values()], width, yerr=[p.bar for p in bar.values()], label=title or None,
                 color=colour, edgecolor="white", hatch=HATCHES[i % len(HATCHES)], capsize=3)
    names = [group.replace(", ", "\n") for group in groups]            # what varies beside it, a line each
    longest = max(len(line) for name in names for line in name.split("\n"))
    axes.figure.set_size_inches(max(_WIDTH, 1.2 + _LETTER * (longest + 2) * len(groups)), 4.5)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_xticks(range(len(groups)), names, fontsize="small")
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(metric + _from_near_the_lowest(axes.set_ylim, shown))
    return True


def _cells(axes: Any, points: Sequence[Point], metric: str) -> bool:
    """A bar a cell, the first on top."""
    titles = [point.others("") or "base" for point in points]
    axes.figure.set_size_inches(8, 1.6 + 0.35 * len(points))
    axes.barh(range(len(points)), [p.mean for p in points], xerr=[p.bar for p in points], color=COLOURS[0], capsize=3)
    axes.set_yticks(range(len(points)), titles, fontsize="small")
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.set_xlabel(metric + _from_near_the_lowest(axes.set_xlim, points))
    return bool(points)


def _from_near_the_lowest(set_limits: Callable[..., Any], points: Sequence[Point]) -> str:
    """Bars of nearly equal height say nothing from zero; the axis begins a half of their spread below the lowest, and says so."""
    low, high = min(p.mean - (p.std or 0.0) for p in points), max(p.mean + (p.std or 0.0) for p in points)
    if 0 < low < high:
        begin = max(low - (high - low) / 2, 0.0)
        set_limits(begin, high + (high - low) / 10)
        return " (the axis does not begin at 0)" if begin > 0 else ""
    return ""
