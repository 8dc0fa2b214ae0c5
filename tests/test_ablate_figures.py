"""ptv2 ablate's figures: which cells make a line, and that a line shows their means and deviations."""

from __future__ import annotations

import pytest

from ptv2_engine import ablate_figures
from ptv2_engine.ablate_figures import Point


def test_lines_of_the_depth_figure():
    points = [Point({"prompt_layers": span}, mean, None) for span, mean in
              (("1-8", .1), ("1-24", .9), ("1-16", .2), ("17-24", .5), ("9-24", .6), ("3-5", .3), ("all", .4), ("4", .45))]
    lines = {title: [(x, p.mean) for x, p in line] for title, line in ablate_figures.depth_lines(points).items()}
    assert lines == {"ascending (layers 1-k)": [(8, .1), (16, .2), (24, .9)],
                     "descending (the top k)": [(4, .45), (8, .5), (16, .6), (24, .9)]}


def test_too_many_lines_become_the_best():
    points = [Point({"prompt_length": str(n), "learning_rate": str(r)}, n + r / 100, None) for n in (16, 4) for r in range(9)]
    lines = ablate_figures.length_lines(points)
    assert len(lines) == 9 and [x for x, _ in lines["learning_rate 3"]] == [4, 16]
    for metric, best in (("f1", [(4, 4.08), (16, 16.08)]), ("loss", [(4, 4.0), (16, 16.0)])):      # a small loss is a good one
        assert {t: [(x, p.mean) for x, p in line] for t, line in ablate_figures.best_of(lines, metric).items()} == {
            "best of 9 other settings": best}


def test_figures_show_the_means_with_their_deviations(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert ablate_figures._length(axes, [Point({"prompt_length": "4"}, 0.5, 0.1), Point({"prompt_length": "64"}, 0.7, 0.2)], "f1")
    bars = axes.containers[0]
    assert list(bars.lines[0].get_xdata()) == pytest.approx([4, 64]) and list(bars.lines[0].get_ydata()) == [0.5, 0.7]
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


def painted(points, metric, monkeypatch, tmp_path, **words):
    """The first figure that is drawn of the points, laid out."""
    backend = pytest.importorskip("matplotlib.backends.backend_agg")
    kept = []

    class Canvas(backend.FigureCanvasAgg):
        def print_png(self, *args, **options):
            kept.append(self.figure)
            super().print_png(*args, **options)

    monkeypatch.setattr(backend, "FigureCanvasAgg", Canvas)
    ablate_figures.draw(tmp_path, points, metric, **words)
    return kept[0]


def test_the_title_says_what_was_measured_and_the_legend_hides_nothing(monkeypatch, tmp_path):
    points = [Point({"reparameterization": r, "learning_rate": n, "num_train_epochs": "100"}, .7, .1)
              for r in ("none", "mlp", "lstm") for n in ("5e-3", "7e-3", "1e-2", "2e-2", "3e-2", "4e-2")]
    figure = painted(points, "f1", monkeypatch, tmp_path, of="rte, roberta-large", where="test data")
    assert figure.get_suptitle() == ("rte, roberta-large: f1 by reparameterization\n"
                                     "test data; error bars: standard deviation over the seeds")
    (axes,), (legend,) = figure.axes, figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["none", "mlp", "lstm"]
    assert legend.get_window_extent().y1 <= axes.get_tightbbox().y0 + 1 and axes.get_legend() is None
    boxes = [t.get_window_extent() for t in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    assert len({patch.get_hatch() for c in axes.containers if hasattr(c, "patches") for patch in c}) == 3     # without colours


def test_ticks_are_at_the_values_and_their_labels_apart(monkeypatch, tmp_path):
    points = [Point({"prompt_length": str(n), "learning_rate": r}, .5, .1) for n in range(5, 105, 5) for r in ("5e-3", "1e-2")]
    figure = painted(points, "f1", monkeypatch, tmp_path)
    (axes,) = figure.axes
    assert list(axes.get_xticks()) == list(range(5, 105, 5))
    boxes = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
    assert len(boxes) > 10 and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    first, second = (c.lines[0] for c in axes.containers)
    assert first.get_marker() != second.get_marker() and first.get_linestyle() != second.get_linestyle()
    assert all(first.get_xdata() < second.get_xdata())                  # error bars stand side by side


def test_more_groups_of_bars_than_can_be_read_become_the_best():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    points = [Point({"reparameterization": r, "prompt_length": str(n)}, n / 10 + (r == "mlp"), None) for r in ("none", "mlp")
              for n in range(1, 10)]
    assert ablate_figures._reparameterization(axes, points, "loss")
    assert [[b.get_height() for b in c] for c in axes.containers if hasattr(c, "patches")] == [[.1], [1.1]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["best of 9 other settings"]
