"""What nvcc made of csrc/cuda: registers and stack of every kernel on every architecture, by cuobjdump, which Triton brings.

    python tests/cuda/resources.py --markdown docs/compiled-cuda.md
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import triton

from ptv2_engine import _cuda, build_info

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MANGLED = re.compile(r"_ZN4ptv24cuda\d+(?P<kernel>[a-z_]+_kernel)(?:I(?P<arguments>.+?)EE)?")


def dump(*options: str) -> str:
    return subprocess.run([str(CUOBJDUMP), *options, str(_cuda.LIBRARY)], capture_output=True, text=True, check=True).stdout


def readable(name: str) -> str:
    """sweep_kernel<Bf16, 64, 1, 0> of a mangled name."""
    found = MANGLED.match(name)
    assert found, name
    arguments = re.findall(r"(Bf16|Fp16)E|L[ib](\d+)E", (found["arguments"] or "") + "E")
    return found["kernel"] + (f"<{', '.join(element or number for element, number in arguments)}>" if arguments else "")


def usage() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> REG, STACK, SHARED and so on, by name."""
    found = {}
    for part in dump("--dump-resource-usage").split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\S+)", part)
        assert arch
        for name, fields in re.findall(r"Function (\S+):\n\s*(.+)", part):
            found[arch[1], readable(name)] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", fields)}
    return dict(sorted(found.items()))


def instructions(arch: str) -> dict[str, set[str]]:
    """Kernel -> the matrix and copy instructions in its machine code."""
    words = ("HGMMA", "HMMA.16816.F32", "LDSM", "LDGSTS")
    functions = dump("-sass", "-arch", arch).split("Function : ")[1:]
    return {readable(function.split()[0]): {word for word in words if word in function} for function in functions}


def markdown() -> str:
    """bf16 and fp16 compile alike: rows of bf16."""
    build, rows = build_info.recorded()["cuda"], usage()
    lines = ["# CUDA C++ kernels, compiled", "",
             f"By nvcc ({build['nvcc']}), with `python tests/cuda/resources.py --markdown docs/compiled-cuda.md`.",
             "fp16 differs by a register or two. Stack is what spilled. Template arguments: element, head dim, and of a sweep",
             "strips a warp, long rows.",
             "", "| kernel | " + " | ".join(f"{arch} registers | {arch} stack" for arch in build["archs"]) + " |",
             "|---|" + "---:|" * 2 * len(build["archs"])]
    for kernel in sorted({kernel for _, kernel in rows if "Fp16" not in kernel}):
        cells = []
        for arch in build["archs"]:
            used = rows.get((arch, kernel))
            cells += [str(used["REG"]), str(used["STACK"])] if used else ["", ""]
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    target = parser.parse_args().markdown
    print(markdown()) if target is None else target.write_text(markdown())
