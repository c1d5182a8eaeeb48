"""Full fine-tuning: our step beside the bare loop's and the floor."""

from __future__ import annotations

from benchmarks.models import SIZES, llama
from benchmarks.side import Options, Result, interleave, ratio
from benchmarks.steps import LENGTH, ROWS, floor, ids_of, ours, plain
from temperament.methods.select.full import Full


def run(options: Options) -> Result:
    result = Result(
        "full",
        "Full fine-tuning step",
        f"{ROWS} rows of {LENGTH} tokens, fp32, AdamW; the floor is forward and backward of "
        "the frozen model with gradients to its activations only.",
        "ms",
    )
    for setting, size in SIZES.items():
        ids = ids_of(1024)
        contenders = {
            "floor": floor(llama(*size), ids),
            "temperament": ours(llama(*size), ids, Full()),
            "bare loop": plain(llama(*size), ids),
        }
        laps = interleave(contenders, options.turns(31 if size[0] < 512 else 15))
        result.add(setting, laps, "floor")
        result.promise(f"our step to the bare loop's, {setting}", ratio(laps["temperament"], laps["bare loop"]), at_most=1.02)
    return result
