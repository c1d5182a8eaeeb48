"""Write a complete, commented recipe.

    temper new sft --base lab/lm --data new.jsonl --out recipe.yaml
    temper new dpo --base Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --method adapters.lora --out recipe.yaml
    temper new grpo --base lab/lm --data questions.jsonl --reward rewards.number --steps 100

Kinds: sft (prompts with completions, conversations, texts), kl-sft (the same, held near the base), dpo (chosen against
rejected answers), grpo (reinforcement learning on verified answers). Every line of the recipe says what it means; rates
are a gentle beginning for the size of the base. In a terminal, what is missing is asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("kind", "sft, kl-sft, dpo or grpo", "KIND", shown="asked"),
    Opt("--base", "what is tuned: lab/lm, a folder, or a Hugging Face id", "BASE"),
    Opt("--data", "a file, folder or data set of rows; a file is looked at, and the recipe reads it as it is", "FILE"),
    Opt("--columns", "columns that the file calls otherwise, e.g. prompt=question,completion=answer", "OURS=THEIRS,..."),
    Opt(
        "--method",
        "what is trained: adapters.lora, select.full, select.half, ... (`temper parts`)",
        "PART",
        default="adapters.lora",
    ),
    Opt("--out", "file to write; without it the recipe goes to stdout", "FILE"),
    Opt("--steps", "optimizer steps", "N", int),
    Opt("--epochs", "passes over the data", "N", float, shown="3, or 200 steps for grpo"),
    Opt("--lr", "highest learning rate", "RATE", float, shown="by size of the base, method and kind"),
    Opt("--batch", "examples a step", "N", int, shown="16, or 64 for grpo"),
    Opt("--reward", "for grpo: what scores an answer", "PART", default="rewards.exact"),
    Opt("--seed", "every draw follows from it", "N", int, 0),
    Opt("--force", "overwrite FILE"),
)
QUESTIONS = (
    ("kind", "What kind of tuning (sft, kl-sft, dpo, grpo)? ", "sft"),
    ("base", "Which base (lab/lm, a folder, a Hugging Face id)? ", "lab/lm"),
    ("data", "Which file of rows? ", ""),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament.cli.app import need, pairs
    from temperament.errors import UserError
    from temperament.run.new import known, write

    if a.kind:
        known(a.kind)
    if sys.stdin.isatty() and say.terminal and not a.json:
        for name, question, usual in QUESTIONS:
            if not getattr(a, name):
                setattr(a, name, ask(question, usual, say))
    need("new", a, "kind", "base", "data")
    if a.out and Path(a.out).exists() and not a.force:
        raise UserError("--out", a.out, "the file exists; name another, or add --force")
    if a.out and not Path(a.out).resolve().parent.is_dir():
        raise UserError("--out", a.out, "its folder does not exist; make it, or name another")
    text = write(
        a.kind,
        base=a.base,
        data=a.data,
        method=a.method,
        steps=a.steps,
        epochs=a.epochs,
        lr=a.lr,
        batch=a.batch,
        reward=a.reward,
        seed=a.seed,
        columns=pairs("--columns", a.columns),
    )
    if a.out:
        from temperament.train.checkpoint import write_atomic

        write_atomic(Path(a.out), text.replace(" FILE ", f" {a.out} "))
    return {"kind": a.kind, "out": a.out, "recipe": text}


def ask(question: str, usual: str, say: Say) -> str:
    print(f"{question}[{usual}] " if usual else question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or usual


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    if data["out"] is None:
        say.print(data["recipe"].rstrip())
        return
    say.out.print(f"[dim]recipe   [/dim] {data['out']}")
    say.out.print(f"[dim]next     [/dim] temper plan {data['out']}", f"          temper tune {data['out']}", sep="\n")
