"""Conventions that run: imports point down, files stay readable, kernels/ is not a package of its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# from the top down; a module may import its own level only where ALLOWED says so
LEVELS = [("cli", "demo"), ("cli_predict", "cli_memory", "cli_data", "cli_bench", "cli_tune", "ablate", "multitask_train"),
          ("cli_train", "ablate_grid", "ablate_figures"), ("cli_tables", "cli_predictions"),
          ("cli_args", "progress", "info"), ("trainer", "lora", "multitask"),
          ("trainer_graphs", "tune"), ("tune_candidates", "timing"), ("tune_cases",),
          ("trainer_memory", "graphed", "throughput"), ("memory",),
          ("model", "adapter_import", "tasks"), ("adapter", "methods", "outputs"),
          ("prompt", "heads", "masked_lm", "cloze", "optim", "hf_config", "presets"),
          ("encoder", "batches", "graph_inputs"), ("packing",),
          ("ops", "testing", "compiled"), ("_native", "_cuda", "kernels"), ("build_info", "errors")]
RANK = {name: rank for rank, names in enumerate(LEVELS) for name in names}


def sources() -> list[Path]:
    return [
        p
        for folder in ("ptv2_engine", "kernels", "csrc", "tests", "benchmarks", "examples")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
    ]


def module_level_imports(path: Path) -> Iterator[str]:
    """Names under ptv2_engine that a file imports when it is imported itself."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in ast.walk(i)
    }
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f) if n is not f}
    for node in ast.walk(tree):
        if id(node) in guarded or id(node) in inside:
            continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(
            node, ast.ImportFrom) and not node.level else []
        if isinstance(node, ast.ImportFrom) and node.module == "ptv2_engine":
            names = [f"ptv2_engine.{a.name}" for a in node.names]
        yield from (n.split(".")[1] for n in names if n.startswith("ptv2_engine."))


def unit_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def test_every_module_has_a_level():
    units = {unit_of(p) for p in (ROOT / "ptv2_engine").rglob("*.py")} - {"__init__"}
    assert units <= set(RANK), units - set(RANK)


def test_imports_point_down():
    wrong = []
    for path in [*(ROOT / "ptv2_engine").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        unit = unit_of(path)
        if unit == "__init__":
            continue
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in module_level_imports(path)
                  if name in RANK and name != unit and RANK[name] <= RANK[unit]]
    assert not wrong, wrong


def test_kernels_import_torch_triton_and_each_other():
    for path in (ROOT / "kernels").glob("*.py"):
        assert set(module_level_imports(path)) <= {"kernels"}, path


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path):
    limit = 500 if path.relative_to(ROOT).parts[0] in ("kernels", "csrc") else 360
    assert len(path.read_text().splitlines()) <= limit


def test_code_is_ascii():
    wrong = [str(p.relative_to(ROOT)) for p in sources() if not p.read_text().isascii() and p.name != "test_data.py"]
    assert not wrong, wrong


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
