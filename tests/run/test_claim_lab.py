"""What experiments are given: rates not held back by their grid, runs and files that seeds share, seeds side by side."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import threading
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from temperament.errors import Unusable, UserError
from temperament.run import claims
from temperament.run.claims import TUNED_ON, WIDER, Lab, least_loss, outward


class Pretend(Lab):
    """A lab whose runs are a formula: the target is best at `peak`."""

    def __init__(self, folder, peak: float):
        super().__init__(folder)
        self.peak, self.ran = peak, []

    def tune(self, name, recipe, seed):
        self.ran.append((name, recipe, seed))
        worth = -abs(recipe / self.peak - self.peak / recipe)
        return {"reached": False, "worth": worth, "retained": 0.0, "target": worth}


@pytest.mark.parametrize("away", [-2, -1, 0, 1, 2])
def test_a_grid_grows_until_its_best_rate_has_a_neighbour_on_either_side(tmp_path, away):
    lab = Pretend(tmp_path, 1e-3 * 2.0**away)
    assert lab.rate("x", lambda rate: rate, [5e-4, 1e-3, 2e-3]) == pytest.approx(lab.peak)
    tried = sorted(rate for _, rate, _ in lab.ran)
    assert tried[0] < lab.peak < tried[-1] and {seed for *_, seed in lab.ran} == {TUNED_ON}
    assert len(tried) == 3 + max(0, abs(away)) == len(set(tried))


def test_a_grid_does_not_grow_for_ever(tmp_path):
    lab = Pretend(tmp_path, 1e6)
    lab.rate("x", lambda rate: rate, [1e-4, 3e-4])
    assert len(lab.ran) == 2 + WIDER
    assert outward({1e-3: 0.0}) is None  # one rate has no spacing
    assert outward({1e-3: 0.0, 2e-3: 0.0}) is None  # nothing says that further is better


def test_least_loss_counts_among_those_that_reached_their_level():
    run = lambda reached, retained, worth: {"reached": reached, "retained": retained, "worth": worth}
    ranked = [run(False, 0.9, 0.1), run(False, 0.1, 0.8), run(True, 0.5, 0.2), run(True, 0.6, 0.1)]
    assert sorted(random.sample(ranked, 4), key=least_loss) == ranked


def test_a_run_that_another_seed_holds_is_left_for_later(tmp_path):
    lab, held = Pretend(tmp_path, 1e-3), FileLock(tmp_path / "x-rate-0.001.lock")
    held.acquire()
    lab.tune = lambda name, recipe, seed, tune=lab.tune: (recipe == 3e-3 and held.release(), tune(name, recipe, seed))[1]
    lab.tried(lambda rate: f"x-rate-{rate:g}", lambda rate: rate, [1e-3, 3e-3])
    assert [rate for _, rate, _ in lab.ran] == [3e-3, 1e-3]


def test_what_runs_read_is_made_once_and_never_half(tmp_path):
    lab, made, texts = Lab(tmp_path), [], []
    make = lambda path: (made.append(path), path.write_text("whole"))
    threads = [threading.Thread(target=lambda: texts.append(Path(lab.made("rows", make)).read_text())) for _ in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert texts == ["whole"] * 8 and len(made) == 1

    def broken(path):
        path.write_text("ha")
        raise OSError

    with pytest.raises(OSError):
        lab.made("more", broken)
    lab.made("more", lambda path: path.write_text("whole"))
    assert (tmp_path / "more").read_text() == "whole"


FAKE = """
from temperament.errors import UserError
from temperament.run.claims import Claim

def run(seed, lab):
    if seed == 7:
        raise UserError("steps", seed, "give fewer")
    (lab.folder / f"{seed}").parent.mkdir(parents=True, exist_ok=True)
    (lab.folder / f"{seed}").write_text("")
    return {"method": {"target": 1.0 + seed / 10}, "baseline": {"target": 0.5}}

claim = Claim("999", "t", "s", (), "target", "higher", run, seeds=SEEDS)
"""


SLOW = """
import os, time
from temperament.run.claims import Claim

def run(seed, lab):
    lab.folder.mkdir(exist_ok=True)
    (lab.folder / f"pid{seed}").write_text(str(os.getpid()))
    time.sleep(60)

claim = Claim("999", "t", "s", (), "target", "higher", run, seeds=(0, 1))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def write(seeds):
        (tmp_path / "999_fake.py").write_text(FAKE.replace("SEEDS", repr(seeds)))
        monkeypatch.setattr(claims, "PLACES", (tmp_path,))
        monkeypatch.setattr(claims.torch, "set_num_threads", lambda cores: None)  # (not after a fork)
        # fork: the workers know the folder that was put in place above
        monkeypatch.setattr(multiprocessing, "get_context", lambda _, real=multiprocessing.get_context: real("fork"))

    return write


def test_seeds_side_by_side_give_what_seeds_in_turn_give(tmp_path, fake):
    fake((0, 1, 2, 3))
    one, two = (claims.carry_out("999", tmp_path / f"{jobs}", record=False, jobs=jobs) for jobs in (1, 2))
    assert two["jobs"] == 2 and {k: v for k, v in one.items() if k not in ("seconds", "jobs")} == {
        k: v for k, v in two.items() if k not in ("seconds", "jobs")
    }
    assert sorted(p.name for p in (tmp_path / "2").iterdir()) == ["0", "1", "2", "3"]


def test_what_goes_wrong_beside_is_told_as_if_it_were_here(tmp_path, fake):
    fake((0, 7, 2))
    with pytest.raises(UserError, match="steps is 7: give fewer"):
        claims.carry_out("999", tmp_path / "out", record=False, jobs=2)


def test_nothing_goes_on_when_who_began_it_is_killed(tmp_path, fake):
    fake((0, 1))
    (tmp_path / "999_fake.py").write_text(SLOW)
    begun = multiprocessing.get_context(None).Process(
        target=claims.carry_out, args=("999", tmp_path / "out"), kwargs={"record": False, "jobs": 2}
    )
    begun.start()
    pids = lambda: [int(p.read_text() or 0) for p in (tmp_path / "out").glob("pid*")]
    until(lambda: len(pids()) == 2 and all(pids()))
    begun.kill()
    begun.join()
    until(lambda: not any(alive(pid) for pid in pids()))


def until(so, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("error", [UserError("a", [1], "mend it"), Unusable("f, line 5", "x", "mend it")])
def test_errors_travel_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and again.field == error.field
