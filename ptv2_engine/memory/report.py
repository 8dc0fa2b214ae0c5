"""Plans as a table, as JSON and as a stacked-bar picture."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptv2_engine.memory.planner import CUDA_CONTEXT, Plan
from ptv2_engine.memory.tracker import BATCH, GRADIENTS, HOST, OPTIMIZER, PROMPTS, SAVED, WEIGHTS, WORKSPACE

ORDER = (WEIGHTS, HOST, PROMPTS, GRADIENTS, OPTIMIZER, SAVED, WORKSPACE, BATCH)
_COLOURS = ("#4c72b0", "#9db4d8", "#dd8452", "#c44e52", "#8172b3", "#55a868", "#937860", "#8c8c8c")


def size(nbytes: float) -> str:
    """18.40 GiB, or MiB below one GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


_HEADINGS = {WEIGHTS: "frozen\nweights", PROMPTS: "prompts\nand head", GRADIENTS: "gradients", OPTIMIZER: "optimizer\nstate",
             SAVED: "saved\nactivations", WORKSPACE: "workspaces"}


def table(plans: Sequence[Plan], width: int = 150, on_cuda: bool = True) -> str:
    """Plans as rows, parts as columns."""
    from rich.console import Console
    from rich.table import Table

    grid = Table()
    grid.add_column("peak memory of a training step")
    for heading in (*_HEADINGS.values(), "in all", "saved a token\nand layer"):
        grid.add_column(heading, justify="right")
    for plan in plans:
        saved = f"{plan.saved_per_token_and_layer:.2f} H bytes" if plan.saved_by_layer else "-"
        grid.add_row(plan.title, *(size(plan.parts.get(part, 0)) for part in _HEADINGS), size(plan.peak), saved)
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(grid)
    for plan in plans:
        if plan.host:
            console.print(f"{plan.title}: {size(plan.host)} of weights stay in host memory", highlight=False)
    if on_cuda:
        console.print(f"A CUDA context (about {size(CUDA_CONTEXT)}, by driver) comes on top.", highlight=False)
    return out.getvalue()


def markdown(plans: Sequence[Plan]) -> str:
    """The same as a Markdown table, plans as rows."""
    lines = ["| | " + " | ".join((*ORDER, "in all")) + " |", "|---" * (len(ORDER) + 2) + "|"]
    for plan in plans:
        cells = [size(plan.parts.get(part, 0)) for part in ORDER]
        lines.append("| " + " | ".join((plan.title, *cells, size(plan.peak))) + " |")
    return "\n".join(lines) + "\n"


def write_json(file: Path, settings: dict[str, Any], plans: Sequence[Plan], more: dict[str, Any]) -> None:
    """Settings, plans and whatever else was found, atomically."""
    from ptv2_engine.adapter import replace_file

    replace_file(file, json.dumps({"settings": settings, "plans": [plan.to_dict() for plan in plans]} | more, indent=2).encode())


def draw(file: Path, plans: Sequence[Plan], heading: str, limit: int | None = None) -> None:
    """A bar a plan, its parts and the driver's context stacked; a line where a step may end on the card. Raises ImportError
    without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.55 * len(plans)), layout="constrained")
    axes = figure.add_subplot()
    titles = [plan.title for plan in plans][::-1]
    left = [0.0] * len(plans)
    context = max((plan.context for plan in plans), default=0)
    for part, colour in zip((*ORDER, "CUDA context"), (*_COLOURS, "#d9d9d9"), strict=True):
        widths = [(plan.context if part == "CUDA context" else plan.parts.get(part, 0)) / 2**30 for plan in plans][::-1]
        if any(widths):
            axes.barh(titles, widths, left=left, label=part, color=colour)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.1f}", va="center")
    if limit is not None:
        axes.axvline((limit + context) / 2**30, color="black", linestyle="--", linewidth=1, label="the card")
    axes.set_xlim(0, max(*left, (limit or 0) / 2**30) * 1.12)
    axes.set_xlabel("GiB at the worst moment of a training step (planned)")
    axes.set_title(heading)
    figure.legend(fontsize="small", loc="outside lower center", ncols=5)
    FigureCanvasAgg(figure).print_png(str(file))
