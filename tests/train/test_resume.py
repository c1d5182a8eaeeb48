"""Stopped anywhere, by anything, a run goes on to the same bits. Twenty moments for each recipe: `python -m tests.train.kill
20`."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

import pytest

from temperament.errors import Interrupted, WorkFailed
from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
from temperament.methods.optim.adamw import AdamW
from temperament.methods.regularizers.kl import KL
from temperament.methods.schedules.linear import Linear
from temperament.methods.select.half import Half
from temperament.protocols import Term
from temperament.run.artefacts import Folder
from temperament.run.recipe import Save, Train
from temperament.run.training import run_train
from temperament.train import checkpoint
from tests.train import kill
from tests.train.rows import Rows, base_of, context

SPEC = Train(
    Rows(),
    CrossEntropy(),
    [Half()],
    AdamW(Linear(start=3e-3, end=1e-4)),
    [KL(0.1)],
    steps=kill.STEPS,
    batch=8,
    micro=4,
    ema=0.9,
    keep="ema",
    save=Save(seconds=1e9, steps=5),
)


def work(spec: Train, folder) -> str:
    """One train step on a tiny model (or the rest of it): the digest of what was trained."""
    base = base_of("llama_tied")
    ctx = context(base, batch=spec.batch, micro=spec.micro)
    folder.mkdir(exist_ok=True)
    return run_train(spec, ctx, Folder(folder), "step", "sft", lambda live, items: {}, lambda *a, **k: None).delta.digest


@pytest.mark.parametrize("which", list(kill.TRAIN))
def test_killed_at_random_moments(which):
    found = kill.trials(which, 3, seed=os.getpid())
    assert all(t["same"] for t in found), found


@pytest.mark.parametrize("which", ["sft", "grpo"])
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, which, blow):
    whole = kill.work(which, tmp_path / "whole")
    pid = os.fork()
    if not pid:
        try:
            kill.work(which, tmp_path / "run", 1000, 0.03)
        except Interrupted as problem:
            (tmp_path / "said").write_text(str(problem))
            os._exit(problem.exit_code)
        finally:
            os._exit(1)
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(pid, blow)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    said = (tmp_path / "said").read_text()
    assert "everything is saved" in said and "--resume" in said
    state, _ = checkpoint.load_newest(tmp_path / "run" / "checkpoints" / "step")
    assert 0 < state["step"] < kill.STEPS and f"after step {state['step']} of {kill.STEPS}" in said
    assert kill.work(which, tmp_path / "run") == whole
    steps = [x["step"] for x in map(json.loads, log.read_text().splitlines()) if "loss" in x]
    assert steps == list(range(1, kill.STEPS + 1)), "a step is logged once"


def test_a_loss_that_turns_nan_keeps_the_last_good_checkpoint(tmp_path):
    class Bad(CrossEntropy):
        def loss(self, micro, views):
            term = super().loss(micro, views)["nll"]
            return {"nll": Term(term.value * (float("inf") if views.progress.step == 13 else 1.0), term.count)}

    spec = replace(SPEC, objective=Bad())
    with pytest.raises(WorkFailed, match=r"became inf at step 14; rows .*--resume") as problem:
        work(spec, tmp_path / "run")
    assert problem.value.exit_code == 1
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints" / "step")[0]["step"] == 10
    # Mended, it goes on from there to the digest of a run in which nothing happened.
    assert work(SPEC, tmp_path / "run") == work(SPEC, tmp_path / "whole")


def test_best_and_stop_survive_a_resume(tmp_path):
    """`keep: best` leaves the version of the best look, also when that was before a resume."""
    values = {4: 0.2, 8: 0.9, 12: 0.3, 16: 0.4, 20: 0.1, 24: 0.0}
    spec = replace(SPEC, keep="best", save=Save(seconds=1e9, steps=10))

    def go(folder, until=99):
        base, looked = base_of("llama_tied"), {}

        def look(live, items):
            step = live.views_step()
            looked[step] = {n: p.tensor.detach().clone() for n, p in live.params.items()}
            if step > until:
                raise KeyboardInterrupt
            return {"target": values[step]}

        ctx = context(base, batch=spec.batch, micro=spec.micro)
        folder.mkdir(exist_ok=True)
        from temperament.train.live import Live

        Live.views_step = lambda live: ctx.views.progress.step + 1
        try:
            return run_train(
                spec, ctx, Folder(folder), "step", "best", look, lambda *a, **k: None, every=4
            ).delta.digest, looked
        except KeyboardInterrupt:
            return None, looked
        finally:
            del Live.views_step

    whole, looked = go(tmp_path / "whole")
    assert go(tmp_path / "run", until=14)[0] is None
    again, later = go(tmp_path / "run")
    assert again == whole and min(later) == 12 and 8 in looked
