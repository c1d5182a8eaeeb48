"""Supervised steps a second: the 1.8 M lab model, 32 rows of about 10 tokens, full fine-tuning with AdamW. Through our loop with its record
written as a run writes it, through the whole of `tune` (ledger, log, progress), through trl's SFTTrainer, and through a bare loop."""

from __future__ import annotations

import io
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import base_of, lab, lab_tokenizer
from benchmarks.side import Lap, Options, Result, Watch, interleave

ROWS = 32
STEPS, WARM = 60, 10  # steps of a lap, of them not counted
SEED = 7


def rows() -> list[dict[str, str]]:
    """2,048 sums: 8 to 10 tokens each with the end."""
    made = [(10 + i * 37 % 89, 10 + i * 53 % 83) for i in range(2048)]
    return [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in made]


def encoded(tokenizer: Any) -> list[Any]:
    from temperament.engine.encode import encode_all
    from temperament.engine.examples import Completion

    return encode_all([Completion(r["prompt"], r["completion"]) for r in rows()], tokenizer)[0]


def ours(log: Path) -> Callable[[], Lap]:
    from temperament.engine.stream import Stream
    from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
    from temperament.methods.optim.adamw import AdamW
    from temperament.methods.select.full import Full
    from temperament.train.context import Context
    from temperament.train.live import Live
    from temperament.train.loop import Player, Views, train
    from temperament.train.world import World

    base, world, optimizer = base_of(lab(), lab_tokenizer()), World(), AdamW(lr=1e-5)
    base.model.train()
    ctx = Context(base, world, batch=ROWS, micro=ROWS)
    live = Live(base, [Full().build(base, ctx)])
    player = Player(
        "policy",
        live,
        optimizer,
        optimizer.build(list(live.params.values()), ctx),
        {"Tokens": CrossEntropy()},
        [],
        Views(live, world, ROWS, SEED),
    )
    stream = Stream(encoded(base.tokenizer), ROWS, SEED)
    file, done = open(log, "a", buffering=1 << 16), 0  # noqa: SIM115 - open as long as the benchmark

    def record(row: dict[str, Any]) -> None:
        file.write(json.dumps({"stage": "sft", **row}) + "\n")

    def lap() -> Lap:
        nonlocal done
        watch = Watch()
        train([player], stream, done + STEPS, micro=ROWS, start=done, record=record, after=starts(watch, done + WARM))
        watch.stop()
        done += STEPS
        return watch.lap(STEPS - WARM)

    return lap


def starts(watch: Watch, at: int) -> Callable[[int], bool]:
    def after(done: int) -> bool:
        if done == at:
            watch.start()
        return False

    return after


def whole(folder: Path) -> Callable[[], Lap]:
    """`tune` with base and tuned model measured, the log written and a moving progress bar; counted are the steps."""
    from rich.console import Console

    from temperament.cli.live import Live
    from temperament.cli.say import Say
    from temperament.run.tune import tune

    data, base = folder / "sums.jsonl", base_of(lab(), lab_tokenizer())
    data.write_text("".join(json.dumps(r) + "\n" for r in rows()))
    recipe = {
        "base": "lab/lm",
        "check": False,
        "seed": SEED,
        "steps": [
            {
                "name": "sft",
                "train": {
                    "source": {"data.file": {"path": str(data), "holdout": 64}},
                    "batch": ROWS,
                    "micro": ROWS,
                    "steps": STEPS,
                    "optimizer": {"optim.adamw": {"lr": 1e-5}},
                },
            }
        ],
        "evaluation": {"items": 32, "dial": None, "diagnose": []},
    }
    turn = 0

    def lap() -> Lap:
        nonlocal turn
        turn += 1
        say, watch = Say(), Watch()
        say.__dict__["err"] = Console(file=io.StringIO(), force_terminal=True, width=120)
        with Live(say) as live:

            def tell(event: str, **data: Any) -> None:
                live(event, **data)
                if event == "step" and data["step"] == WARM:
                    watch.start()
                elif event == "step" and data["step"] == STEPS:
                    watch.stop()

            tune(recipe, folder / f"run{turn}", base=base, tell=tell)
        return watch.lap(STEPS - WARM)

    return lap


def bare() -> Callable[[], Lap]:
    """What a careful person writes by hand: batches ready-made, padding masked out of the loss, clipping, AdamW, the loss looked at."""
    model, made = lab().train(), encoded(lab_tokenizer())
    params = list(model.parameters())
    stepper = torch.optim.AdamW(params, lr=1e-5, fused=True)
    batches, done = [], 0
    from temperament.engine.encoded import collate

    for start in range(0, len(made), ROWS):
        tokens = collate(made[start : start + ROWS])
        labels = torch.where(tokens.weights > 0, tokens.ids, -100)
        batches.append({"input_ids": tokens.ids, "attention_mask": tokens.mask.long(), "labels": labels})

    def lap() -> Lap:
        nonlocal done
        watch = Watch()
        for k in range(STEPS):
            if k == WARM:
                watch.start()
            loss = model(**batches[done % len(batches)], use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
            loss.item()
            done += 1
        watch.stop()
        return watch.lap(STEPS - WARM)

    return lap


def trl(folder: Path) -> Callable[[], Lap]:
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    watch = Watch()

    class Time(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM:
                watch.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS:
                watch.stop()

    config = SFTConfig(
        str(folder / "trl"),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=SEED,
        max_grad_norm=1.0,
    )
    trainer = SFTTrainer(
        lab(), config, train_dataset=Dataset.from_list(rows()), processing_class=lab_tokenizer(), callbacks=[Time()]
    )
    trainer.log = lambda *_, **__: None  # its figures are computed; only their printing is left out

    def lap() -> Lap:
        trainer.train()
        return watch.lap(STEPS - WARM)

    return lap


def run(options: Options) -> Result:
    result = Result(
        "sft",
        "Supervised fine-tuning, steps a second",
        f"The 1.8 M lab model, {ROWS} rows of 8 to 10 tokens, all weights, fp32, AdamW.",
        "steps/s",
        rate=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        contenders = {
            "temperament, the loop": ours(folder / "log.jsonl"),
            "temperament, tune": whole(folder),
            "trl": trl(folder),
            "bare loop": bare(),
        }
        laps = interleave(contenders, options.turns(7), warm=1)
    result.add("32 x 10 tokens", laps)
    speed = {name: statistics.median(x.units / x.wall for x in of) for name, of in laps.items()}
    for name in ("temperament, the loop", "temperament, tune"):
        result.promise(f"{name} to the bare loop", speed[name] / speed["bare loop"], at_least=23 / 23.7)
        result.promise(f"{name} to trl", speed[name] / speed["trl"], at_least=23 / 19.9)
    return result
