"""One recipe of each family on two CPU processes: the run of one process within rounding, generation and search included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.run import two

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("families")
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.run.two"]
    done = subprocess.run([*launch, str(out / "2")], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, two.carried_out(out / "1")


@pytest.mark.parametrize("family", two.FAMILIES)
def test_it_is_the_run_of_one_process(runs, family):
    out, one = runs
    folder = family.replace(" ", "-")
    lines = (out / "2" / folder / "log.jsonl").read_text().splitlines()
    both = [r for line in lines if "loss" in (r := json.loads(line))]
    assert len(both) == len(one[family]) >= 3
    for a, b in zip(one[family], both, strict=True):
        assert {k: b[k] for k in a} == pytest.approx(a, rel=1e-3, abs=1e-5)
    deltas = [sorted((out / n / folder).glob("delta/*.safetensors")) for n in ("1", "2")]
    assert deltas[0] and [p.name for p in deltas[0]] == [p.name for p in deltas[1]]
    for p, q in zip(*deltas, strict=True):
        x, y = load_file(p), load_file(q)
        assert x.keys() == y.keys()
        for n in (n for n in x if x[n].is_floating_point()):  # rounding, through three steps of Adam
            assert x[n].shape == y[n].shape and float((x[n] - y[n]).norm()) < 1e-3 * float(x[n].norm()) + 1e-6, n
