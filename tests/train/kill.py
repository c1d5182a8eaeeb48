"""Kill a recipe at random moments and resume it: the digest must be that of the undisturbed run.

    python -m tests.train.kill 20            20 moments for each of SFT, DPO and GRPO; one JSON line each, exit 1 if any differs

Every attempt is a forked child that is killed by SIGKILL at a moment drawn over the whole length of the undisturbed run, then
resumed until it ends. What a child can see of the world is only its folder.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from temperament.run.tune import tune

STEPS = 24
LAB = {"data.lab": {"skills": ["copy", "reverse"], "rows": 64}}
RATE = {"optim.adamw": {"lr": {"schedules.linear": {"start": 3e-3, "end": 1e-4}}}}
TRAIN: dict[str, dict[str, Any]] = {
    "sft": {
        "source": LAB,
        "trainable": "select.half",
        "optimizer": RATE,
        "regularizers": [{"regularizers.kl": {"weight": 0.1}}],
        "batch": 8,
        "micro": 4,
        "ema": 0.9,
        "keep": "ema",
    },
    "dpo": {
        "source": {"data.lab": {**LAB["data.lab"], "pairs": True}},
        "objective": "objectives.preference.dpo",
        "trainable": [{"adapters.lora": {"rank": 2, "dropout": 0.1}}],
        "optimizer": RATE,
        "batch": 4,
    },
    "grpo": {
        "source": {"rollout.sample": {"prompts": LAB, "rewards": ["rewards.lab"], "group": 4, "max_new": 6}},
        "objective": {"objectives.policy.grpo": {"beta": 0.02}},
        "trainable": [{"adapters.lora": {"rank": 2}}],
        "optimizer": RATE,
        "batch": 8,
    },
}


def recipe(which: str, every: int) -> dict[str, Any]:
    """A checkpoint each `every` steps; what the run leaves is compared, not what it can do."""
    spec = {**TRAIN[which], "steps": STEPS, "save": {"seconds": 1e9, "steps": every}}
    evaluation = {"base": False, "keep": False, "suites": [{"evaluate.lab": {"retained": ["copy"], "items": 1}}]}
    steps = [{"name": "step", "train": spec, "ledger": False}]
    return {"base": "lab/lm-small", "steps": steps, "evaluation": evaluation, "check": False}


def work(which: str, folder: Path, every: int = 5, slow: float = 0.0) -> str:
    """One run (or the rest of it) in `folder`; the digest of what it left. slow: seconds each step takes at least."""
    tell = lambda event, **data: time.sleep(slow) if event == "step" else None
    return tune(recipe(which, every), folder, resume=(folder / "run.json").exists(), tell=tell).delta.digest


def child(*args: Any) -> int:
    """The process id of a fork that does `work` and writes its digest beside the folder."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        digest = work(*args)
        args[1].with_suffix(".digest").write_text(digest)
        code = 0
    except BaseException as problem:
        print(type(problem).__name__, problem, file=sys.stderr)
    finally:
        os._exit(code)


def ended(pid: int, within: float | None = None) -> bool:
    """Wait for a child (at most `within` seconds); did it end well by itself?"""
    end = None if within is None else time.monotonic() + within
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the child failed with {status}"
            return not os.WIFSIGNALED(status)
        if end is not None and time.monotonic() >= end:
            return False
        time.sleep(0.002)


def trial(which: str, place: Path, whole: str, length: float, rng: random.Random) -> dict[str, Any]:
    """Kill one run once or twice at random moments, resume it to its end, compare."""
    folder = place / f"{which}-{rng.getrandbits(48)}"
    kills = []
    for _ in range(rng.choice([1, 1, 2])):
        pid, moment = child(which, folder), rng.uniform(0.1, 1.05) * length
        if ended(pid, moment):
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kept = sorted(p.name for p in (folder / "checkpoints" / "step").glob("step-*"))
        kills.append({"after": round(moment, 3), "kept": kept[-1] if kept else None})
    if not folder.with_suffix(".digest").exists():
        ended(child(which, folder))
    digest = folder.with_suffix(".digest").read_text()
    lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    steps = [x["step"] for x in lines if "loss" in x]
    shutil.rmtree(folder)
    same = digest == whole and steps == list(range(1, STEPS + 1))
    return {"recipe": which, "kills": kills, "same": same, "digest": digest[:16]}


def trials(which: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        torch.set_num_threads(1)
        work(which, Path(place) / "warm", 1000)  # what is imported and compiled once is inherited by every fork
        whole = Path(place) / f"{which}-whole"
        began = time.monotonic()
        assert ended(child(which, whole))
        length = time.monotonic() - began
        return [trial(which, Path(place), whole.with_suffix(".digest").read_text(), length, rng) for _ in range(n)]


def main(n: int = 20, recipes: list[str] | None = None, seed: int = 0) -> int:
    wrong = 0
    for which in recipes or list(TRAIN):
        found = trials(which, n, seed)
        wrong += sum(not t["same"] for t in found)
        moments = [k["kept"] for t in found for k in t["kills"]]
        line = {"recipe": which, "trials": n, "same": sum(t["same"] for t in found), "kills": len(moments), "kept": moments}
        print(json.dumps(line), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, sys.argv[2:] or None, int(os.environ.get("SEED", "0"))))
