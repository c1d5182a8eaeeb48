"""Tokens a second of `engine.tokens.generate` beside transformers' own `generate`: the 1.8 M lab model, batches of 64, no early end."""

from __future__ import annotations

import statistics

import torch

from benchmarks.models import lab
from benchmarks.side import Lap, Options, Result, Watch, interleave
from temperament.engine.tokens import Sampling, generate

ROWS, PROMPT, NEW = 64, 16, 32


def run(options: Options) -> Result:
    result = Result(
        "generation",
        "Generation, tokens a second",
        f"The 1.8 M lab model, {ROWS} rows, prompts of {PROMPT} tokens, {NEW} new.",
        "tokens/s",
        rate=True,
    )
    model = lab().eval()
    ids = torch.randint(3, model.config.vocab_size, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    uneven = [row[: PROMPT - i % (PROMPT // 2)] for i, row in enumerate(ids.tolist())]
    alike = [row for row in ids[: ROWS // 8].tolist() for _ in range(8)]
    greedy, sampled = Sampling(max_new=NEW, min_new=NEW), Sampling(max_new=NEW, min_new=NEW, temperature=1.0)
    theirs = {"max_new_tokens": NEW, "min_new_tokens": NEW, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    work = {
        "temperament, greedy": lambda: generate(model, ids.tolist(), greedy),
        "transformers, greedy": lambda: model.generate(ids, do_sample=False, **theirs),
        "temperament, sampled": lambda: generate(model, ids.tolist(), sampled),
        "transformers, sampled": lambda: model.generate(ids, do_sample=True, top_k=0, **theirs),
        "temperament, uneven prompts": lambda: generate(model, uneven, sampled),
        "temperament, 8 samples a prompt": lambda: generate(model, alike, sampled),
    }

    def counted(go) -> Lap:
        with Watch() as watch:
            go()
        return watch.lap(ROWS * NEW)

    laps = interleave({name: lambda go=go: counted(go) for name, go in work.items()}, options.turns(11))
    result.add(f"batches of {ROWS}", laps)
    for name in ("temperament, greedy", "temperament, sampled"):
        result.promise(f"{name}, tokens a second", statistics.median(x.units / x.wall for x in laps[name]), at_least=9000)
    return result
