"""What `test_two_processes.py` computes, on as many processes as it is launched with: gradients and a few steps of training.

python -m torch.distributed.run --nproc_per_node=2 -m tests.train.two OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from temperament.bases.train_diffusion import fresh
from temperament.methods.adapters.lora import LoRA
from temperament.methods.objectives.consistency.ict import ICT
from temperament.methods.objectives.diffusion.denoise import Denoise
from temperament.methods.objectives.diffusion.mmd import MMD
from temperament.methods.objectives.policy.grpo import GRPO
from temperament.methods.objectives.preference.dpo import DPO
from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
from temperament.methods.optim.adamw import AdamW
from temperament.methods.regularizers.kl import KL
from temperament.methods.select.full import Full
from temperament.run.check import check
from temperament.run.laws import gradient
from temperament.run.recipe import Recipe, Step
from temperament.run.training import build_players
from temperament.train.loop import train
from tests.generators import LCM, Pictures, unet
from tests.train.rows import Rows, base_of, context, spec
from tests.train.test_loop import Decay, InfoNCE

CASES = {
    "sft": dict(source=Rows(), objective=CrossEntropy(), regularizers=[KL(0.2), Decay()], trainable=[Full()], batch=5, micro=2),
    "one row": dict(source=Rows(), objective=CrossEntropy(), trainable=[Full()], batch=1, micro=4),
    "packed": dict(source=Rows(packed=True), objective=CrossEntropy(per="example"), trainable=[Full()], batch=6, micro=1),
    "dpo": dict(source=Rows("Pairs"), objective=DPO(), trainable=[LoRA(rank=2, dropout=0.2)], batch=7, micro=3),
    "grpo": dict(source=Rows("Rollout"), objective=GRPO(beta=0.1), trainable=[Full()], batch=8, micro=3),
    "noise": dict(source=Rows("Images"), objective=Denoise(unsaid=0.2), trainable=[LoRA(rank=2)], batch=7, micro=3),
    "coupled": dict(source=Rows(), objective=InfoNCE(), trainable=[Full()], batch=6, micro=2),
    "consistency": dict(
        source=Pictures(5), objective=ICT(first=4, last=8), trainable=[LoRA(rank=2, dropout=0.2)], batch=5, micro=2
    ),
    "mmd": dict(source=Pictures(5), objective=MMD(steps=2, guidance=1.0), trainable=[LoRA(rank=2)], batch=5, micro=2),
}
BASES = {
    "sft": lambda: base_of("mixtral"),
    "noise": lambda: fresh("flow", 0),
    "consistency": lambda: unet(LCM),
    "mmd": lambda: unet(LCM),
}


def results() -> dict[str, torch.Tensor]:
    out = {}
    for name, options in CASES.items():
        options = dict(options, optimizer=AdamW(1e-3, weight_decay=0.1), steps=4)
        base = BASES.get(name, lambda: base_of("llama_tied"))()
        ctx = context(base, batch=options["batch"], micro=options["micro"])
        (player,) = build_players(spec(**options), ctx)
        stream = options["source"].open(ctx)
        got, loss = gradient(player, options["objective"], stream.batch(0), options["micro"])
        out |= {f"{name}/gradient/{n}": g for n, g in got.items()} | {f"{name}/loss": torch.tensor([loss])}
        rows = []
        train([player], stream, 4, micro=options["micro"], record=rows.append)
        out |= {f"{name}/trained/{n}": p.tensor.detach() for n, p in player.live.params.items()}
        out[f"{name}/log"] = torch.tensor([[r["loss"], r["grad_norm"], r["tokens"]] for r in rows])
        player.live.close()
    step = Step("sft", train=spec(**CASES["sft"]))
    assert check(Recipe("tiny", [step]), base_of("llama_tied"), ctx.world)["ok"]
    out["processes"] = torch.tensor([ctx.world.size])
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = results()
    from accelerate.state import PartialState

    state = PartialState()
    save_file(
        {k: v.clone().contiguous() for k, v in found.items()},
        Path(sys.argv[1]) / f"{state.num_processes}.{state.process_index}.safetensors",
    )
    state.wait_for_everyone()
    if state.num_processes > 1:
        torch.distributed.destroy_process_group()
