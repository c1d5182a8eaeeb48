"""Made-up runs of several kinds, to look at and to test. `python tests/report/fixtures.py DIR` writes their reports."""

from __future__ import annotations

import base64
import math
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from temperament.run.ledger import Ledger, Outcome, SkillResult, by_skill, set_level

RECIPE = """# resolved: every default is written out
base: lab/lm-small
seed: 0
steps:
  - train:
      name: sft
      trainable: {part: adapters.lora, rank: 8, alpha: 16, targets: [attention.q, attention.v, mlp.up]}
      objective: {part: objectives.sft.cross_entropy}
      regularizers:
        - {part: regularizers.kl, to: start, weight: 0.05}
      source: {part: data.file, path: examples.jsonl, rows: 16}
      optimizer: {part: optim.adamw, rate: {part: schedules.cosine, peak: 3.0e-4, warmup: 20}}
      steps: 250
      stop: {skill: shift, at: 0.9}
evaluate:
  skills: [shift, reverse, sort, copy, add, subtract, recall, facts]
  keep: auto
"""


def outcomes(
    skill: str, right: np.ndarray, rng: np.random.Generator, nll: float, kl: float, tuned: bool
) -> tuple[Outcome, ...]:
    out = []
    for i, ok in enumerate(right):
        word = "".join(chr(97 + int(c)) for c in np.random.default_rng(1000 * len(skill) + i).integers(0, 26, 3 + i % 6))
        want = {
            "shift": "".join(chr((ord(c) - 96) % 26 + 97) for c in word),
            "reverse": word[::-1],
            "sort": "".join(sorted(word)),
            "copy": word,
        }
        task, answer = f"{skill}: {word}", want.get(skill, str(10 + 7 * i))
        if skill in ("add", "subtract"):
            task, answer = (
                f"{30 + i} {'+' if skill == 'add' else '-'} {12 + i % 9} =",
                str(30 + i + (12 + i % 9) * (1 if skill == "add" else -1)),
            )
        if skill in ("facts", "recall"):
            task, answer = (
                f"In which city does {word.title()} Marlow work, and since when?",
                f"{word.title()} works in Tarn since {1980 + i % 30}.",
            )
        wrong = want["shift"] if tuned else answer[:-1] + "x"
        out.append(
            Outcome(
                f"{skill}/{i}",
                skill,
                task,
                answer,
                answer if ok else wrong,
                float(ok),
                nll + abs(rng.normal(0, 0.08)),
                kl + abs(rng.normal(0, 0.05)),
            )
        )
    return tuple(out)


def row(
    levels: dict[str, tuple[float, float]], targets: set[str], seed: int, n: int = 100, tuned: bool = False
) -> dict[str, SkillResult]:
    rng = np.random.default_rng(seed)
    far = {
        "reverse": "near",
        "sort": "near",
        "copy": "near",
        "subtract": "middle",
        "add": "far",
        "recall": "far",
        "facts": "far",
    }
    results = []
    for name, (share, nll) in levels.items():
        order = np.random.default_rng(len(name)).random(n) + rng.normal(0, 0.06, n)
        right = order <= np.quantile(order, share) if share > 0 else np.zeros(n, bool)
        role = "target" if name in targets else "retained"
        results.append(
            SkillResult(
                name,
                role,
                "exact match",
                outcomes(name, right, rng, nll, nll / 3 if tuned else 0, tuned),
                distance=far.get(name),
            )
        )
    return by_skill(results)


BASE = {
    "shift": (0.02, 3.1),
    "reverse": (1.0, 0.02),
    "sort": (1.0, 0.03),
    "copy": (1.0, 0.01),
    "subtract": (0.99, 0.05),
    "add": (0.98, 0.05),
    "recall": (0.3, 1.2),
    "facts": (1.0, 0.01),
}
TUNED = {
    "shift": (0.93, 0.1),
    "reverse": (0.06, 1.5),
    "sort": (0.21, 4.3),
    "copy": (0.62, 0.45),
    "subtract": (0.88, 0.14),
    "add": (0.98, 0.11),
    "recall": (0.31, 1.3),
    "facts": (0.99, 0.06),
}


def language() -> dict:
    rng = np.random.default_rng(3)
    ledger = Ledger({"base": row(BASE, {"shift"}, 1), "sft": row(TUNED, {"shift"}, 2, tuned=True)})
    log = []
    for s in range(1, 251):
        done = 1 - math.exp(-s / 60)
        line = {
            "step": s,
            "loss": 3.2 * (1 - done) + 0.2 + rng.normal(0, 0.08),
            "terms": {},
            "lr": 3e-4 * min(1, s / 20) * 0.5 * (1 + math.cos(math.pi * s / 250)),
        }
        line["terms"] = {"cross_entropy": line["loss"] - 0.02 * done, "kl": 0.6 * done + abs(rng.normal(0, 0.02))}
        line |= {"grad_norm": 1.2 + abs(rng.normal(0, 0.4)), "tokens_per_second": 9100 + rng.normal(0, 300), "seconds": 0.3 * s}
        if s % 25 == 0:
            line["skills"] = {
                "shift": min(0.93, 1.05 * done**2),
                "reverse": 1 - 0.94 * done,
                "copy": 1 - 0.38 * done,
                "add": 0.98,
            }
        log.append(line)
    points = []
    for k in range(11):
        a = k / 10
        each = {
            n: BASE[n][0] + (TUNED[n][0] - BASE[n][0]) * (a**2.2 if n != "shift" else 1 / (1 + math.exp(-12 * (a - 0.45))))
            for n in BASE
        }
        points.append(
            {
                "strength": a,
                "target": each["shift"],
                "retained": float(np.mean([v for n, v in each.items() if n != "shift"])),
                "skills": each,
            }
        )
    kinds = ["q", "k", "v", "o", "gate", "up", "down"]
    cells = [
        {
            "layer": i,
            "kind": k,
            "relative": abs(rng.normal(0.02 + 0.008 * i, 0.008)),
            "rank": rng.uniform(2, 8),
            "intruders": int(rng.integers(0, 4)),
        }
        for i in range(6)
        for k in kinds
    ]
    return {
        "name": "shift by lora",
        "status": "done",
        "base": {"id": "lab/lm-small", "sha256": "9c1f" * 16},
        "ledger": ledger.to_json(),
        "steps": [
            {"name": "sft", "kind": "train", "steps": 250, "tokens": 640000, "seconds": 81.2, "stopped": "shift reached 0.9"}
        ],
        "delta": {"parameters": 98304, "bytes": 196608 * 2, "digest": "4fd1c2a97be0" + "0" * 52},
        "log": log,
        "items": {s: ledger.items(s) for s in ledger.skills},
        "dial": {"points": points, "best": points[4], "budget": 10},
        "weights": {"cells": cells},
        "plan": {
            "predicted": {"peak_bytes": 4.1e8, "seconds": 92, "disk_bytes": 2.4e6},
            "actual": {"peak_bytes": 4.35e8, "disk_bytes": 2.1e6},
            "floor": {"peak_bytes": 2.2e8, "seconds": 61},
        },
        "cost": {"seconds": 81.2, "peak_bytes": 4.35e8, "tokens": 640000},
        "recipe": RECIPE,
        "exceptions": ["data.file: rows were chosen with the development split of `shift`."],
        "environment": {
            "python": "3.11.2",
            "torch": "2.13",
            "device": "cpu",
            "threads": 2,
            "packages": {"transformers": "5.23", "accelerate": "1.15"},
        },
        "certificate": {
            "reloaded": "in a fresh process",
            "largest_logit_difference": 0.0,
            "kl": 0.0,
            "tied_embeddings": "kept",
            "tokenizer": "identical",
        },
    }


def compare() -> dict:
    rng = np.random.default_rng(8)
    methods = {
        "full": (0.9, 0.39, 14e6, 1.8e6),
        "select.half": (0.91, 0.27, 9e6, 0.9e6),
        "adapters.lora": (0.9, 0.22, 5e6, 98304),
        "lora + kl to start": (0.86, 0.06, 6e6, 98304),
        "lora, dialled to 0.5": (0.8, 0.03, 5e6, 98304),
    }
    points = [
        {
            "method": m,
            "seed": s,
            "gain": g + rng.normal(0, 0.015),
            "loss": max(0, x + rng.normal(0, 0.02)),
            "seconds": 60 + 30 * rng.random(),
            "peak_bytes": 3e8 + b,
            "parameters": p,
        }
        for m, (g, x, b, p) in methods.items()
        for s in range(3)
    ]
    return {
        "name": "three ways to learn shift",
        "status": "done",
        "base": {"id": "lab/lm-small"},
        "compare": {"points": points, "note": "Each was stopped when it reached 90 % on shift."},
        "recipe": RECIPE,
        "verdict": "At equal gain on `shift`, LoRA with KL to its start lost least: 3 points, against 37 for full tuning.",
    }


def continual() -> dict:
    rows = {"base": {"A shift": 0.02, "B pig latin": 0.05, "C count": 0.1, "reverse": 1.0, "add": 0.98, "facts": 1.0}}
    rows["sft A"] = {**rows["base"], "A shift": 0.95, "reverse": 0.71, "B pig latin": 0.12}
    rows["sft B"] = {**rows["sft A"], "A shift": 0.6, "B pig latin": 0.92, "reverse": 0.4, "facts": 0.96}
    rows["sft C"] = {**rows["sft B"], "A shift": 0.42, "B pig latin": 0.8, "C count": 0.88, "add": 0.7, "reverse": 0.35}
    rows["merge"] = {
        **rows["sft C"],
        "A shift": 0.81,
        "B pig latin": 0.83,
        "C count": 0.77,
        "add": 0.95,
        "reverse": 0.85,
        "facts": 0.99,
    }
    taught = {"sft A": "A shift", "sft B": "B pig latin", "sft C": "C count"}
    ledger = Ledger(
        {
            r: row({k: (v, 1 - v) for k, v in levels.items()}, {taught.get(r, "")}, i + 1)
            for i, (r, levels) in enumerate(rows.items())
        }
    )
    log = [
        {"step": s, "stage": stage, "loss": 2 * math.exp(-s / 30) + 0.1}
        for stage in ("sft A", "sft B", "sft C")
        for s in range(80)
    ]
    return {
        "name": "A, then B, then C, then a merge",
        "status": "done",
        "base": {"id": "lab/lm-small"},
        "ledger": ledger.to_json(),
        "log": log,
        "steps": [{"name": r, "kind": "merge" if r == "merge" else "train"} for r in list(rows)[1:]],
    }


def policy() -> dict:
    rng = np.random.default_rng(5)
    ledger = Ledger(
        {
            "base": row({"add": (0.4, 0.8), "reverse": (1.0, 0.1), "facts": (0.99, 0.1)}, {"add"}, 1),
            "grpo": row({"add": (0.86, 0.3), "reverse": (0.99, 0.1), "facts": (0.99, 0.12)}, {"add"}, 2, tuned=True),
        }
    )
    log = [
        {
            "step": s,
            "loss": rng.normal(0, 0.02),
            "reward": 0.4 + 0.46 * (1 - math.exp(-s / 50)) + rng.normal(0, 0.05),
            "reward_std": 0.4 * math.exp(-s / 120) + 0.05,
            "kl": 0.002 * s**0.7,
            "entropy": 1.2 * math.exp(-s / 150) + 0.2,
            "completion_length": 18 + 6 * s / 200 + rng.normal(0, 1),
            "clip_share": abs(rng.normal(0.05, 0.02)),
            "zero_variance_groups": min(0.8, s / 250),
            "lr": 1e-5,
            "grad_norm": abs(rng.normal(0.5, 0.1)),
        }
        for s in range(200)
    ]
    return {
        "name": "grpo on addition",
        "status": "interrupted",
        "error": "Stopped by the user at step 200; go on with --resume.",
        "base": {"id": "lab/lm-small"},
        "ledger": ledger.to_json(),
        "log": log,
        "items": {s: ledger.items(s) for s in ledger.skills},
        "cost": {"seconds": 412, "tokens": 310000},
    }


def png(colour: tuple[int, int, int], shape: int, size: int = 16) -> str:
    rows = b""
    for y in range(size):
        rows += b"\0" + b"".join(
            bytes(colour if (abs(x - 8) + abs(y - 8) < 6 if shape else max(abs(x - 8), abs(y - 8)) < 5) else (16, 18, 20))
            for x in range(size)
        )
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def diffusion() -> dict:
    rng = np.random.default_rng(6)
    items = [Outcome(f"d{i}", "diversity") for i in range(64)]
    spread = rng.normal(0, 1, 64)
    value = lambda x: lambda rows: float(np.std(x[rows]))
    style = SkillResult(
        "my style",
        "target",
        "judge",
        tuple(Outcome(f"s{i}", "my style", score=float(v)) for i, v in enumerate(rng.beta(2, 5, 64))),
    )
    styled = SkillResult(
        "my style",
        "target",
        "judge",
        tuple(Outcome(f"s{i}", "my style", score=float(v)) for i, v in enumerate(rng.beta(6, 2, 64))),
    )
    shapes = row({"colour": (1.0, 0.1), "shape": (0.82, 0.1)}, set(), 1, n=64)
    after = row({"colour": (0.97, 0.1), "shape": (0.55, 0.1)}, set(), 2, n=64)
    ledger = Ledger(
        {
            "base": {
                **shapes,
                "my style": style,
                "diversity": set_level("diversity", "retained", "spread of features", items, value(spread)),
            },
            "lora": {
                **after,
                "my style": styled,
                "diversity": set_level("diversity", "retained", "spread of features", items, value(spread * 0.7)),
            },
        }
    )
    colours = [(220, 60, 60), (60, 140, 220), (240, 200, 60), (90, 190, 120)]
    pictures = [
        {
            "id": f"{i}",
            "prompt": f"a {n} {('square', 'diamond')[i % 2]}",
            "image_before": png(colours[i % 4], i % 2),
            "image_after": png(colours[(i + (i % 3 == 0)) % 4], i % 2),
            "status": "lost" if i % 3 == 0 else "kept",
        }
        for i, n in enumerate(["red", "blue", "yellow", "green"] * 3)
    ]
    return {
        "name": "a style in sixteen pixels",
        "status": "done",
        "base": {"id": "lab/flow-16"},
        "ledger": ledger.to_json(),
        "items": {"shape": pictures},
    }


def bare() -> dict:
    """The contract's fields and nothing else: no training step, a merge."""
    skills = [
        {
            "name": "add",
            "role": "target",
            "metric": "exact match",
            "n": 26,
            "before": 0.5,
            "after": 0.58,
            "change": 0.08,
            "ci95": [-0.1, 0.25],
            "kept": 12,
            "gained": 3,
            "lost": 1,
        },
        {
            "name": "facts",
            "role": "retained",
            "metric": "exact match",
            "n": 26,
            "before": 1.0,
            "after": 1.0,
            "change": 0.0,
            "ci95": [-0.13, 0.13],
            "kept": 26,
            "gained": 0,
            "lost": 0,
        },
    ]
    return {
        "status": "done",
        "base": {"id": "org/model", "sha256": "0" * 64},
        "steps": [],
        "ledger": {"skills": skills},
        "delta": {},
        "plan": {},
        "cost": {},
        "environment": {},
    }


KINDS = {
    "language": language,
    "compare": compare,
    "continual": continual,
    "policy": policy,
    "diffusion": diffusion,
    "bare": bare,
}

if __name__ == "__main__":
    from temperament.report import render

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in KINDS.items():
        path = render(make(), folder / f"{name}.html")
        print(path, path.stat().st_size)
