"""Small generators of random weights for tests, and pictures for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from temperament.bases import train_diffusion as lab
from temperament.bases.load import Base
from temperament.bases.pipeline import write_pipeline
from temperament.nn.batch import Images
from temperament.parts import part

LCM = lab.SCHEDULERS["unet"] | {"_class_name": "LCMScheduler"}
CM = {"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0,
      "sigma_data": 0.5, "rho": 7.0, "clip_denoised": False}  # fmt: skip
WORDS = ["a red cross at the top left on navy", "a blue disc at the top right on black", "a white bar at the top left on grey"]


def unet(scheduler: dict, seed: int = 0, side: int = 8) -> Base:
    """A U-Net like lab/unet, a few channels wide."""
    from diffusers import UNet2DConditionModel

    base = lab.fresh("unet", seed)
    torch.manual_seed(seed)
    base.components["denoiser"] = UNet2DConditionModel(
        sample_size=side, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4).eval()  # fmt: skip
    base.processors["scheduler"] = dict(scheduler)
    return base


def pictures(rows: int = 5, side: int = 8, seed: int | None = None) -> Images:
    g = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    ids = torch.randint(0, 10**6, (rows,), generator=g)
    return Images(torch.rand(rows, 3, side, side, generator=g), ids, captions=[WORDS[int(i) % 3] for i in ids])


def folder(base: Base, place: Path) -> str:
    """The base as a folder of diffusers."""
    template, scheduler = place.parent / f"{place.name}-template", base.processors["scheduler"]
    for name in ("scheduler", "tokenizer"):
        (template / name).mkdir(parents=True)
    (template / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    base.processors["tokenizer"].save_pretrained(template / "tokenizer")
    named = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
             "scheduler": ["diffusers", scheduler["_class_name"]]}  # fmt: skip
    (template / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **named}))
    base.processors["pipeline"] = template
    write_pipeline(base, place)
    return str(place)


@part("data.test_pictures", modalities=("image",))
@dataclass(frozen=True)
class Pictures:
    """Pictures for tests: a function of the step."""

    rows: int = 4  # of a batch
    side: int = 8  # pixels
    yields: ClassVar = ("Images",)

    def open(self, ctx: Any) -> Any:
        return self

    def batch(self, step: int, progress: Any = None) -> Images:
        return pictures(self.rows, self.side, 1000 + step)
