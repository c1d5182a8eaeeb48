"""Two CPU processes (gloo) train as one: same gradients to 1e-5, the same on both, and the same run within rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from temperament.run.laws import distance
from tests.train import two

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    }
    # torchrun chooses a free port itself with --standalone
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "tests.train.two",
        str(out),
    ]
    done = subprocess.run(launch, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "2.0.safetensors"), load_file(out / "2.1.safetensors"), two.results()


def part(found, name):
    return {k: t for k, t in found.items() if k.startswith(name + "/")}


def test_both_processes_hold_the_same_bits(runs):
    first, second, one = runs
    assert first["processes"] == 2 and one["processes"] == 1
    assert first.keys() == second.keys() == one.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("case", two.CASES)
def test_gradients_are_those_of_one_process(runs, case):
    first, _, one = runs
    deviation, where = distance(part(one, f"{case}/gradient"), part(first, f"{case}/gradient"))
    assert deviation < 1e-5, (deviation, where)
    assert torch.allclose(first[f"{case}/loss"], one[f"{case}/loss"], rtol=1e-5)


@pytest.mark.parametrize("case", two.CASES)
def test_the_run_is_that_of_one_process(runs, case):
    """Four AdamW steps at 1e-3: Adam turns rounding of near-zero gradients into up to a step, so tensors agree in the norm."""
    first, _, one = runs
    assert torch.allclose(first[f"{case}/log"], one[f"{case}/log"], rtol=1e-4, atol=1e-5)
    for name, want in part(one, f"{case}/trained").items():
        assert float((first[name] - want).norm()) < 1e-3 * float(want.norm()) + 1e-4, name
