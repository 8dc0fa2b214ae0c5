"""ptv2 ablate's figures: which cells make a line, and that a line shows their means and deviations."""

from __future__ import annotations

import pytest

from ptv2_engine import ablate_figures
from ptv2_engine.ablate_figures import Point


def test_lines_of_the_depth_figure():
    points = [Point({"prompt_layers": span}, mean, None) for span, mean in
              (("1-8", .1), ("1-24", .9), ("1-16", .2), ("17-24", .5), ("9-24", .6), ("3-5", .3), ("all", .4))]
    lines = {title: [(x, p.mean) for x, p in line] for title, line in ablate_figures.depth_lines(points).items()}
    assert lines == {"ascending (layers 1-k)": [(8, .1), (16, .2), (24, .9)],
                     "descending (the top k)": [(8, .5), (16, .6), (24, .9)]}


def test_too_many_lines_become_the_best():
    points = [Point({"prompt_length": str(n), "learning_rate": str(r)}, n + r / 100, None) for n in (16, 4) for r in range(9)]
    lines = ablate_figures.length_lines(points)
    assert len(lines) == 9 and [x for x, _ in lines["learning_rate 3"]] == [4, 16]
    assert {t: [(x, p.mean) for x, p in line] for t, line in ablate_figures.best_of(lines).items()} == {
        "best of 9 other settings": [(4, 4.08), (16, 16.08)]}


def test_figures_show_the_means_with_their_deviations(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert ablate_figures._length(axes, [Point({"prompt_length": "4"}, 0.5, 0.1), Point({"prompt_length": "64"}, 0.7, 0.2)], "f1")
    bars = axes.containers[0]
    assert list(bars.lines[0].get_xdata()) == [4, 64] and list(bars.lines[0].get_ydata()) == [0.5, 0.7]
    assert [tuple(s[:, 1]) for s in bars.lines[2][0].get_segments()] == [pytest.approx((0.4, 0.6)), pytest.approx((0.5, 0.9))]
    assert axes.get_ylabel() == "f1" and [t.get_text() for t in axes.get_xticklabels()] == ["4", "64"]

    axes = Figure().add_subplot()
    points = [Point({"reparameterization": r, "prompt_length": n}, v, None) for r, n, v in
              (("none", "4", .5), ("none", "8", .6), ("mlp", "4", .4), ("mlp", "8", .7))]
    assert ablate_figures._reparameterization(axes, points, "accuracy")
    assert [[round(b.get_height(), 6) for b in c] for c in axes.containers if hasattr(c, "patches")] == [[.5, .6], [.4, .7]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["prompt_length 4", "prompt_length 8"]

    written = ablate_figures.draw(tmp_path, points, "accuracy")
    assert sorted(f.name for f in written) == ["length.png", "reparameterization.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") and f.stat().st_size > 5000 for f in written)
    rest = [Point({"learning_rate": r}, .5, .1) for r in ("1e-3", "1e-2")]
    assert [f.name for f in ablate_figures.draw(tmp_path, rest, "accuracy")] == ["cells.png"]
