"""LoRA, rank 16, on all linear maps: the full training step beside PEFT's and the floor."""

from __future__ import annotations

import statistics

import peft

from benchmarks.models import SIZES, llama
from benchmarks.side import Options, Result, interleave
from benchmarks.steps import LENGTH, ROWS, floor, ids_of, ours, plain
from temperament.methods.adapters.lora import LoRA


def run(options: Options) -> Result:
    result = Result(
        "lora",
        "LoRA step, rank 16 on all linear maps",
        f"{ROWS} rows of {LENGTH} tokens, fp32, AdamW; the floor is forward "
        "and backward of the frozen model with gradients to its activations only.",
        "ms",
    )
    for setting, size in SIZES.items():
        ids = ids_of(1024)
        theirs = peft.get_peft_model(llama(*size), peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        contenders = {
            "floor": floor(llama(*size), ids),
            "temperament": ours(llama(*size), ids, LoRA(rank=16)),
            "peft": plain(theirs, ids),
        }
        laps = interleave(contenders, options.turns(51 if size[0] < 512 else 25))
        result.add(setting, laps, "floor")
        cost = {name: statistics.median(x.wall for x in of) for name, of in laps.items()}
        excess = (cost["temperament"] - cost["floor"]) / (cost["peft"] - cost["floor"])
        result.promise(f"excess over the floor, ours to PEFT's, {setting}", excess, at_most=0.5)
    return result
