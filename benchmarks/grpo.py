"""A GRPO step of the 1.8 M lab model: 8 prompts, 8 completions each, 24 tokens every one, a rule that scores them; sampling, scoring, loss,
backward and AdamW. Beside trl's GRPOTrainer, and beside the parts it is made of: generation alone, and one forward and backward."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import base_of, lab, lab_tokenizer
from benchmarks.side import Lap, Options, Result, Watch, interleave

PROMPTS, GROUP, NEW = 8, 8, 24
STEPS, WARM = 8, 2  # steps of a lap, of them not counted
SEED = 7


def prompts() -> list[str]:
    return [f"{10 + i * 37 % 89}+{10 + i * 53 % 83}=" for i in range(512)]


def mark(text: str) -> float:
    """The rule: how many unlike characters a completion has."""
    return float(len(set(text)))


class Marks:
    """The rule as a reward of ours."""

    def score(self, prompt: Any, outputs: Sequence[str], row: Any) -> list[float | None]:
        return [mark(o) for o in outputs]


class Questions:
    """The prompts as examples."""

    def examples(self, ctx: Any) -> list[Any]:
        from temperament.engine.examples import Prompt

        return [Prompt(p) for p in prompts()]


def ours() -> tuple[Callable[[], Lap], Callable[[], Lap], Callable[[], Lap]]:
    """The step; the source alone; the update alone."""
    from temperament.methods.objectives.policy.grpo import GRPO
    from temperament.methods.optim.adamw import AdamW
    from temperament.methods.rollout.sample import Sample
    from temperament.methods.select.full import Full
    from temperament.train.context import Context
    from temperament.train.live import Live
    from temperament.train.loop import Player, Views, train
    from temperament.train.world import World

    rows = PROMPTS * GROUP
    base, world, optimizer = base_of(lab(), lab_tokenizer()), World(), AdamW(lr=1e-6)
    base.model.train()
    ctx = Context(base, world, SEED, batch=rows, micro=rows)
    live = Live(base, [Full().build(base, ctx)])
    ctx.live, ctx.views = live, Views(live, world, rows, SEED)
    player = Player(
        "policy", live, optimizer, optimizer.build(list(live.params.values()), ctx), {"Rollout": GRPO()}, [], ctx.views
    )
    stream = Sample(Questions(), [Marks()], group=GROUP, max_new=NEW, min_new=NEW).open(ctx)
    done = 0

    def lap() -> Lap:
        nonlocal done
        watch = Watch()

        def after(k: int) -> bool:
            if k == done + WARM:
                watch.start()
            return False

        train([player], stream, done + STEPS, micro=rows, start=done, after=after)
        watch.stop()
        done += STEPS
        return watch.lap(STEPS - WARM)

    def source() -> Lap:
        with Watch() as watch:
            for k in range(3):
                stream.batch(10_000 + k)
        return watch.lap(3)

    class Kept:
        it = stream.batch(20_000)

        def batch(self, step: int, progress: Any = None) -> Any:
            return self.it

    def update() -> Lap:
        with Watch() as watch:
            train([player], Kept(), 3, micro=rows)
        return watch.lap(3)

    return lap, source, update


def trl(folder: Path) -> Callable[[], Lap]:
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    disable_progress_bars()
    watch = Watch()

    class Time(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM:
                watch.start()
            elif state.global_step == STEPS:
                watch.stop()

    config = GRPOConfig(
        str(folder),
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=NEW,
        max_steps=STEPS,
        generation_kwargs={"min_new_tokens": NEW},
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=SEED,
    )
    trainer = GRPOTrainer(
        lab(),
        lambda completions, **_: [mark(c) for c in completions],
        config,
        train_dataset=Dataset.from_list([{"prompt": p} for p in prompts()]),
        processing_class=lab_tokenizer(),
        callbacks=[Time()],
    )
    trainer.log = lambda *_, **__: None

    def lap() -> Lap:
        trainer.train()
        return watch.lap(STEPS - WARM)

    return lap


def run(options: Options) -> Result:
    torch.manual_seed(SEED)
    result = Result(
        "grpo",
        "GRPO step",
        f"The 1.8 M lab model, {PROMPTS} prompts x {GROUP} completions x {NEW} tokens, all weights, fp32, no reference.",
        "ms",
    )
    step, source, update = ours()
    with tempfile.TemporaryDirectory() as folder:
        contenders = {"temperament": step, "of it, sampling": source, "of it, the update": update, "trl": trl(Path(folder))}
        laps = interleave(contenders, options.turns(9), warm=1)
    result.add(f"{PROMPTS * GROUP} x {NEW} tokens", laps)
    cost = {name: statistics.median(x.wall / x.units for x in of) for name, of in laps.items()}
    result.promise("our step to trl's", cost["temperament"] / cost["trl"], at_most=0.27 / 0.38)
    return result
