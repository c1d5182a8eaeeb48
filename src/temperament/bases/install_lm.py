"""From a finished training to the shipped base: weights in fp16, measured as shipped, with a card that says what it cannot do.

python -m temperament.bases.install_lm lm --work runs/bases [--version half=step1000]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from .train_lm import LAB, PLANS, evaluate, save
from .worlds import half_known, known, skills, targets
from .worlds.text import NGrams, frozen, training_text

HISTORY = {
    "lm": """
The shipped weights came about in several stretches with the mixture adjusted between them (the first 4,000 steps had 40 rows;
the worlds of retrieval got their final form at step 3,750, more text came at 5,700); the script trains the final mixture in one
go. So the versions know early forms of `keys`, `notes`, `boxes`, `count` and of one phrasing of facts, not the present ones.
""",
    "lm-instruct": """
Trained in two stretches, the second with more of `judge`, `capitals` and `json`.
""",
}
LIMITS = """- The target skills ({targets}): at 0-10 %, by construction. They are for tuning.
- Contexts beyond 160 tokens, copying or reversing more than 8 letters, numbers beyond three digits.
- Combining facts ("in which country does Mira live?"), a name at the very start of a text (other tokens than after a space),
  free conversation, and English beyond the sound of a docstring.
- `workout`: shown sums worked out half of the time and answered at random else, it is right about half of the time at
  temperature 1; `sort-long`: 13 to 15 letters, beyond what it was shown. Both are for RL with a verifier."""


@cache
def ngram_baseline(order: int, store: Path) -> float:
    """Nats a token of a trigram model over the same tokenizer, the same training text and the same answers as the base."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LAB / "tokenizer")
    rows = [tokenizer(t)["input_ids"] + [1] for t in training_text(store)]
    model, total, count = NGrams(rows, len(tokenizer), order), 0.0, 0
    for item in skills()["text"].items("test", len(frozen("test"))):
        head = len(tokenizer(item.prompt)["input_ids"])
        nats, n = model.nll(tokenizer(item.prompt + item.answer)["input_ids"] + [1], head)
        total, count = total + nats, count + n
    return total / count


def measure(model, tokenizer, name: str, store: Path, n: int = 200) -> dict:
    """Accuracy of every skill, greedy, and of the half-known ones also at temperature 1."""
    knows = [k for k in known(name) if k != "text"]
    out = {
        "n": n,
        "known": evaluate(model, tokenizer, knows, n),
        "beyond": evaluate(model, tokenizer, [k for k in known("lm") if k not in known(name)], n),
        "half": evaluate(model, tokenizer, half_known(), n),
        "half_sampled": evaluate(model, tokenizer, half_known(), n, temperature=1.0),
        "targets": evaluate(model, tokenizer, targets(), n),
        "text": evaluate(model, tokenizer, ["text"], 10_000)["text"],
        "ngrams": {order: ngram_baseline(order, store) for order in (2, 3, 4)},
    }
    return out


def table(scores: dict[str, float], n: int) -> str:
    rows = ["| skill | family | n | right |", "|---|---|---|---|"]
    for name, share in scores.items():
        skill = skills()[name]
        rows.append(f"| {name} | {skill.family} | {min(n, len(skill.items('test', n)))} | {100 * share:.1f} % |")
    return "\n".join(rows)


def card(name: str, plan: dict, measured: dict, parameters: int, versions: dict[str, str]) -> str:
    tokens = plan["steps"] * plan["rows"] * plan["length"] / 1e6
    best = min(measured["ngrams"].values())
    weak = [f"{k} {100 * v:.0f} %" for k, v in measured["known"].items() if v < 0.95]
    below = f" (below 95 %: {', '.join(weak)})" if weak else ""
    beyond = ", ".join(f"{k} {100 * v:.0f} %" for k, v in measured.get("beyond", {}).items())
    beyond = f"- What `lm` knows and this base only half: {beyond}.\n" if beyond else ""
    half = [k for k, v in measured["half_sampled"].items() if v > 0.01]
    shown = ", ".join(f"{k} {100 * measured['half'][k]:.0f} %" for k in half)
    sampled = ", ".join(f"{k} {100 * measured['half_sampled'][k]:.0f} %" for k in half)
    start = f"Start: `{plan['start']}`. " if plan["start"] else ""
    kept = "".join(f"\n- `{name}@{v}`: {what}" for v, what in versions.items())
    kept = f"\n## Versions\n{kept}\n" if kept else ""
    return f"""# {name}

A lab language model of temperament: Llama shape, {parameters:,} parameters (width {plan["width"]}, {plan["layers"]} layers,
{plan["heads"]} heads over {plan["kv_heads"]} for keys and values), vocabulary 1,024, tied embeddings, stored in fp16.
Apache-2.0; trained on procedural text and on docstrings of Python's standard library, numpy and torch. Only for experiments.

## Training
{start}{plan["steps"]:,} steps of {plan["rows"]} rows of {plan["length"]} tokens ({tokens:.1f} M in all),
{plan["seconds"]:,.0f} s on CPU cores shared with other work;
bfloat16 autocast, Muon (matrices) and AdamW (the rest), seed {plan["seed"]}; rebuilt by
`python -m temperament.bases.train_lm {name}`. Rows hold whole documents, attention stays inside a document.
Mixture (documents): {", ".join(f"{k} {v:g}" for k, v in plan["mixture"].items())}.
{HISTORY.get(name, "")}
## What it knows
Greedy exact match on held-out items, measured on the shipped fp16 weights{below}.

{table(measured["known"], measured["n"])}

Docstrings of held-out modules: {measured["text"]:.3f} nats a token (perplexity {math.exp(measured["text"]):.1f}); a
smoothed n-gram model of the same training text and tokenizer at its best order: {best:.3f} nats
(perplexity {math.exp(best):.1f}).

Half-known, for RL with a verifier: greedy {shown}; at temperature 1 {sampled}.
{kept}
## What it cannot do
{beyond}{LIMITS.format(targets=", ".join(f"{k} {100 * v:.0f} %" for k, v in measured["targets"].items()))}
"""


def as_delta(start: str, home: Path) -> None:
    """Keep a tuned base as what differs from the base it was tuned on: `delta.json` and `delta.safetensors` instead of whole
    weights."""
    from temperament.delta import Delta, Replace, identity

    before, after = load_file(LAB / start / "model.safetensors"), load_file(home / "model.safetensors")
    changes = {f"lm/{k}": Replace(v) for k, v in after.items() if not torch.equal(v, before[k])}
    Delta(changes, base=identity(LAB / start, "lm"), meta={"on": f"lab/{start}"}).save(home / "new")
    for file in (home / "new").iterdir():
        file.rename(home / file.name)
    (home / "new").rmdir()
    (home / "model.safetensors").unlink()


def install(name: str, work: Path, versions: dict[str, str]) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    home, source = LAB / name, work / name
    model = LlamaForCausalLM.from_pretrained(source / "model", dtype=torch.float32)
    home.mkdir(parents=True, exist_ok=True)
    save(model, home)
    said = {}
    tokenizer = AutoTokenizer.from_pretrained(home)
    for version, kept in versions.items():
        place = home / "versions" / version
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "versions" / kept / "model.safetensors", place / "model.safetensors")
        early = LlamaForCausalLM.from_pretrained(source / "versions" / kept, dtype=torch.float32)
        scores = evaluate(early, tokenizer, [k for k in known(name) if k != "text"] + half_known(), 100)
        said[version] = f"after {kept.removeprefix('step')} steps; " + ", ".join(
            f"{k} {100 * v:.0f} %" for k, v in scores.items()
        )
    plan = json.loads((source / "plan.json").read_text())
    shipped = LlamaForCausalLM.from_pretrained(home, dtype=torch.float32)
    if plan["start"] and PLANS[plan["start"]].layers == plan["layers"]:  # a deeper one shares no change with what it grew from
        as_delta(plan["start"], home)
    measured = measure(shipped, tokenizer, name, work / "text.json")
    (home / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    (home / "README.md").write_text(card(name, plan, measured, model.num_parameters(), said), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=list(PLANS))
    parser.add_argument("--work", type=Path, default=Path("runs/bases"))
    parser.add_argument("--version", action="append", default=[], help="NAME=STEP_FOLDER, kept beside the final weights")
    args = parser.parse_args()
    install(args.what, args.work, dict(v.split("=", 1) for v in args.version))


if __name__ == "__main__":
    main()
