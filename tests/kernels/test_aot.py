"""Every kernel compiled for A100, H100 and B200 without a GPU: registers, spills, shared memory, matrix instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from compiled_table import differences, markdown, parsed

import ptv2_engine
from ptv2_engine.compiled import SHARED_LIMIT

TABLE = Path(__file__).parents[2] / "docs" / "compiled.md"
COLUMNS = {"case": 34, "kernel": 23, "tiles": 9, "warps": 5, "sm": 3, "registers": 9, "stack": 5, "shared": 6, "matrix": 11}
MATRIX = {80: "mma.sync", 90: "mma", 100: "mma"}
ATTENTION = ("forward_kernel", "sweep_kernel", "dq_kernel", "dkdv_kernel", "prefix_grad_kernel", "relative_forward_kernel",
             "relative_dq_kernel", "relative_dkdv_kernel", "packed_forward_kernel", "packed_sweep_kernel", "packed_dq_kernel",
             "packed_dkdv_kernel")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Those of aot.py, from a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(ptv2_engine.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    run = subprocess.run([sys.executable, str(Path(__file__).with_name("aot.py"))], env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(rows: list[dict]) -> list[str]:
    """What is wrong with the compiled kernels, one line each."""
    wrong = []
    for row in rows:
        name = f"{row['kernel']} {row['tiles']} sm_{row['sm']} ({row['case']})"
        if row["stack"] or row["local"]:
            wrong.append(f"{name} spills {row['stack']} bytes of stack and {row['local']} of local memory")
        if row["shared"] > SHARED_LIMIT[row["sm"]]:
            wrong.append(f"{name} needs {row['shared']} bytes of shared memory; the card has {SHARED_LIMIT[row['sm']]}")
        if row["registers"] > 255:
            wrong.append(f"{name} needs {row['registers']} registers")
        if row["kernel"] in ATTENTION and "fp32" not in row["case"] and MATRIX[row["sm"]] not in row["matrix"]:
            wrong.append(f"{name} does not use the tensor cores")
    return wrong


def test_kernels_compile_without_spills(rows, capsys):
    seen = {row["kernel"] for row in rows}
    with capsys.disabled():
        print()
        for row in [{name: name for name in COLUMNS}, *rows]:
            print(" ".join(f"{row[name]:>{width}}" for name, width in COLUMNS.items()))
    assert seen == {*ATTENTION, "reduce_kernel", "tile_list_kernel", "add_norm_fwd_kernel", "add_norm_bwd_kernel",
                    "renorm_kernel",
                    "embedding_kernel", "dropout_kernel", "gelu_kernel", "gelu_bwd_kernel", "gelu_packed_kernel",
                    "gelu_packed_bwd_kernel", "rotary_kernel", "geglu_fwd_kernel", "geglu_bwd_kernel",
                    "dequantise_rows_kernel", "dequantise_nf4_kernel"}
    assert not (wrong := check(rows)), "\n".join(wrong)


def test_the_committed_table_is_what_is_compiled(rows):
    version, table = parsed(TABLE.read_text())
    if version != triton.__version__:
        pytest.skip(f"docs/compiled.md is of Triton {version}, and {triton.__version__} is installed")
    wrong = differences(rows, table)
    assert not wrong, "\n".join([*wrong, "make it anew: python tests/kernels/aot.py 80,90,100 --markdown docs/compiled.md"])
    assert {row["case"] for row in table} == {row["case"] for row in rows} and {row["sm"] for row in table} == {80, 90, 100}


def test_a_row_that_is_not_the_tables_is_named(rows):
    assert parsed(markdown(rows, "3.6.0", "a command")) == ("3.6.0", [
        {name: value for name, value in row.items() if name != "local"} for row in sorted(rows, key=lambda row: row["sm"])])
    changed = [rows[0] | {"stack": 8}, rows[1] | {"registers": 1}, rows[2] | {"tiles": "16x16"}, *rows[3:]]
    wrong = differences(changed, rows)
    assert len(wrong) == 2 and "stack, shared, matrix are [8, " in wrong[0] and "no such row" in wrong[1]


def test_the_check_names_a_spill_and_too_much_shared_memory():
    row = {"case": "S64 P16 D64 bf16", "kernel": "dq_kernel", "tiles": "64x64x16", "sm": 90, "stack": 8, "local": 0,
           "registers": 255,
           "shared": 240000, "matrix": ""}
    assert len(check([row])) == 3
