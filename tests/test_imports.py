"""Import promises, each in a fresh process: from the checkout and elsewhere, installed both ways, without optional packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Block())
"""


def run_python(code: str, cwd: Path, path: str | None = None, executable: str = sys.executable) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path is not None:
        environment["PYTHONPATH"] = path
    done = subprocess.run([executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


TRAIN = """
import torch
from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.testing import padded_batch, tiny_model
model = PromptedModel.from_pretrained(tiny_model('bert'), num_labels=2, prompt=PromptConfig(3))
model(**padded_batch([4, 2]), labels=torch.tensor([0, 1])).loss.backward()
assert model.prompt.bank.grad.abs().sum() > 0
"""


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_trains_without_triton_and_datasets(where, tmp_path):
    run_python(BLOCK.format(names={"triton", "datasets"}) + TRAIN, ROOT if where == "root" else tmp_path)


def test_importing_is_light(tmp_path):
    out = run_python("import sys, ptv2_engine; print(sorted({m.split('.')[0] for m in sys.modules} & "
                     "{'torch', 'transformers', 'datasets', 'triton', 'peft'}))", tmp_path)
    assert out.strip() == "[]"
    out = run_python("import sys, ptv2_engine.ops; print(sorted({m.split('.')[0] for m in sys.modules} & "
                     "{'transformers', 'datasets', 'triton'}))", tmp_path)
    assert out.strip() == "[]"


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_kernels_are_found_and_transformers_own_probe_survives_the_name(where, tmp_path):
    run_python("import ptv2_engine.kernels.tuning\n"
               "from transformers.utils import is_kernels_available\n"
               "assert is_kernels_available() is False", ROOT if where == "root" else tmp_path)


@pytest.mark.parametrize("editable", [False, True])
def test_both_ways_of_installing_work_from_the_root_and_from_elsewhere(editable, tmp_path):
    """A copy of the sources, installed into an environment that borrows this one's packages; without compiling csrc."""
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\0")
    if not listed[0]:
        pytest.skip("not a git checkout: the list of sources is unknown")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and name.split("/")[0] in (
            "ptv2_engine",
            "kernels",
            "csrc",
            "setup.py",
            "pyproject.toml",
            "MANIFEST.in",
            "README.md",
            "LICENSE",
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    target = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True)
    python = str(target / "bin" / "python")
    site = next((target / "lib").glob("python*/site-packages"))
    borrowed = [p for p in sys.path if p.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--ignore-installed",
        *(["-e"] if editable else []),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"PTV2_BUILD_NATIVE": "0", "PTV2_BUILD_CUDA": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    code = ("import ptv2_engine, ptv2_engine.kernels.tuning, ptv2_engine.ops as ops; print(ptv2_engine.__file__); "
            "assert ops.backend_for('add_norm').backend == 'reference'\n" + TRAIN)
    for cwd in (source, tmp_path):
        place = run_python(code, cwd, executable=python)
        assert (str(source) in place) or (str(target) in place), place
