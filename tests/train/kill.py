"""Kill a training at random moments and resume it: the digest must be that of the undisturbed run.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from temperament.methods.adapters.lora import LoRA
from temperament.methods.objectives.policy.grpo import GRPO
from temperament.methods.objectives.preference.dpo import DPO
from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
from temperament.methods.optim.adamw import AdamW
from temperament.methods.regularizers.kl import KL
from temperament.methods.schedules.linear import Linear
from temperament.methods.select.half import Half
from temperament.nn import draws
from temperament.nn.batch import Rollout, Tokens
from temperament.nn.logprobs import label, score
from temperament.run.artefacts import Folder
from temperament.run.recipe import Save, Train
from temperament.run.training import run_train
from tests.train.rows import Rows, base_of, context

STEPS = 24


@dataclass(frozen=True)
class Sampled(Rows):
    """Responses sampled from the policy as it stands: every later batch depends on every step before it."""

    yields: ClassVar = ("Rollout",)

    def open(self, ctx):
        return _Sampling(self, ctx)


class _Sampling:
    def __init__(self, rows: Rows, ctx: Any):
        self.rows, self.ctx, self.best = rows, ctx, torch.zeros(1)

    @torch.no_grad()
    def batch(self, step: int, progress: Any = None) -> Rollout:
        start = self.rows.make(self.ctx.batch, step)
        ids, examples = start.ids.clone(), start.examples
        for t in range(3, 8):
            logits = self.ctx.live.model(input_ids=ids[:, :t], use_cache=False).logits[:, -1]
            u = draws.uniform(self.ctx.seed, "kill/sample", step, examples[:, 0], t)
            ids[:, t] = (logits.softmax(-1).cumsum(-1) < u[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
        ids, t = ids[:, :8], torch.arange(8)
        one = Tokens(ids, (t >= 3).float().expand(len(ids), -1), torch.zeros_like(ids), examples[:, :1].expand(-1, 8).clone())
        rewards = (ids[:, 3:] % 7 == 0).float().sum(1) - self.best * 0.01
        return Rollout(one, score(self.ctx.live.model, one, label())["label"], rewards, torch.arange(len(ids)) // 4)

    def feedback(self, batch, trace):
        """A state of its own, which must be in the checkpoint."""
        self.best = torch.maximum(self.best, batch[0].rewards.max()[None])
        return {"best": float(self.best)}

    def state_dict(self):
        return {"tensors": {"best": self.best}, "json": {"seen": True}}

    def load_state_dict(self, state):
        assert state["json"] == {"seen": True}
        self.best = state["tensors"]["best"]


RECIPES: dict[str, Callable[[], Train]] = {
    "sft": lambda: Train(
        Rows(),
        CrossEntropy(),
        [Half()],
        AdamW(Linear(start=3e-3, end=1e-4)),
        [KL(0.1)],
        steps=STEPS,
        batch=8,
        micro=4,
        ema=0.9,
        keep="ema",
    ),
    "dpo": lambda: Train(Rows("Pairs"), DPO(), [LoRA(rank=2, dropout=0.1)], AdamW(3e-3), steps=STEPS, batch=4, micro=4),
    "grpo": lambda: Train(Sampled(), GRPO(beta=0.02), [LoRA(rank=2)], AdamW(3e-3), steps=STEPS, batch=8, micro=8),
}


def work(which: str, folder: Path, every: int = 5, slow: float = 0.0) -> str:
    """One run (or the rest of it) in `folder`; the digest of what was trained. slow: seconds each step takes at least."""
    spec = replace(RECIPES[which](), save=Save(seconds=1e9, steps=every))
    base = base_of("llama_tied")
    ctx = context(base, batch=spec.batch, micro=spec.micro)
    tell = lambda event, **data: time.sleep(slow) if event == "step" else None
    folder.mkdir(exist_ok=True)
    return run_train(spec, ctx, Folder(folder), "step", which, lambda live, items: {}, tell).delta.digest


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
    for which in recipes or list(RECIPES):
        found = trials(which, n, seed)
        wrong += sum(not t["same"] for t in found)
        moments = [k["kept"] for t in found for k in t["kills"]]
        line = {"recipe": which, "trials": n, "same": sum(t["same"] for t in found), "kills": len(moments), "kept": moments}
        print(json.dumps(line), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, sys.argv[2:] or None, int(os.environ.get("SEED", "0"))))
