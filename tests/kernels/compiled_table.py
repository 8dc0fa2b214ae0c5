"""docs/compiled.md: what aot.py found, as a Markdown table, and back."""

from __future__ import annotations

from typing import Any

COLUMNS = ("sm", "case", "kernel", "tiles", "warps", "registers", "stack", "shared", "matrix")
NUMBERS = ("sm", "warps", "registers", "stack", "shared")
Rows = list[dict[str, Any]]


def markdown(rows: Rows, triton: str, command: str) -> str:
    """The page: rows by architecture, in the order of the cases."""
    lines = ["# Compiled kernels", "",
             f"Made by `{command}`", f"with Triton {triton} and its own ptxas, without a GPU: what the engine launches.",
             "stack: bytes that a thread spills; shared: bytes of shared memory of a block; matrix: the tensor cores' product.",
             "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row[name]) for name in COLUMNS) + " |" for row in sorted(rows, key=lambda row: row["sm"])]
    return "\n".join(lines) + "\n"


def parsed(page: str) -> tuple[str, Rows]:
    """Triton's version and the rows of a page."""
    version = page.split("with Triton ")[1].split()[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line.startswith("| ")][1:]
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in cells]
    return version, [row | {name: int(row[name]) for name in NUMBERS} for row in rows]


def differences(rows: Rows, table: Rows) -> list[str]:
    """Where rows are not the table's: spills, shared memory and the matrix instruction; registers are the compiler's affair."""
    identity, held = COLUMNS[:5], ("stack", "shared", "matrix")
    known: dict[tuple, list] = {}
    for row in table:                                        # a kernel with other options may have the same tiles
        known.setdefault(tuple(row[key] for key in identity), []).append([row[key] for key in held])
    wrong = []
    for row in rows:
        name, found = tuple(row[key] for key in identity), [row[key] for key in held]
        if found not in known.get(name, []):
            wrong.append(f"{name}: {', '.join(held)} are {found}; the table has {known.get(name, 'no such row')}")
    return wrong
