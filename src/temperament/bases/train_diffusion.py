"""Train the lab's generators: `python -m temperament.bases.train_diffusion unet|flow`, some tens of minutes on one core each.

    unet    a fully convolutional U-Net with skips, self- and cross-attention; the velocity of a diffusion with 1000 times
            (epsilon hardly says what a picture under much noise is of: it learnt shapes and colours, never places)
    flow    a transformer in the shape of Stable Diffusion 3; the velocity of a flow

Pictures of the sprite world with one subject, their captions read by a text encoder of two layers that learns along; the
caption is left out one time in ten, for guidance. What ships is the running mean of the weights. A fixed seed; every minute
a line says how many of a hundred samples show what was asked, by the world's own eye."""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from temperament.bases.frozen import frozen
from temperament.bases.load import Base, load
from temperament.bases.worlds import sprites
from temperament.engine import see
from temperament.engine.denoise import Denoiser, Sampler, denoise
from temperament.engine.pictures import resized, size_of
from temperament.nn import draws

LAB = Path(__file__).parent / "lab"
SCHEDULERS = {
    "unet": {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear",
             "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction", "clip_sample": False,
             "timestep_spacing": "trailing",
             "set_alpha_to_one": True},
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
}  # fmt: skip
JUDGE = (  # how a card's shares are to be read
    "named: shape, colour and place are each told from their alternatives as asked by lab/clip-b, an image-text encoder\n"
    "trained on renders. The other shares are by a lookup of the nearest render of the world (`sprites.recognise`), which\n"
    "rejects nothing: a picture of no scene counts as its nearest one."
)
PIPELINES = {"unet": "StableDiffusionPipeline", "flow": "StableDiffusion3Pipeline"}


@dataclass(frozen=True)
class Plan:
    minutes: float = 30.0
    steps: int = 6000
    rows: int = 64
    rate: float = 1.5e-3
    warmup: int = 200
    mean: float = 0.999  # decay of the running mean
    unsaid: float = 0.1  # share of captions left out
    scenes: int = 40_000
    seed: int = 0


def tokenizer():
    """Word by word, over the words of the sprite world."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *sprites.vocabulary(), *(f"{i}" for i in range(10)), *RARE]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=24, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>", unk_token="<unk>")  # fmt: skip


RARE = ("sks", "zwx", "qvo", "blik")  # words no caption holds: names for what is taught later


def modules(kind: str, words: int) -> dict[str, nn.Module]:
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=words, hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=2,
                            num_attention_heads=4, max_position_embeddings=24, bos_token_id=1, eos_token_id=2,
                            pad_token_id=0)  # fmt: skip
    if kind == "unet":
        net = UNet2DConditionModel(sample_size=16, in_channels=3, out_channels=3, block_out_channels=(32, 64, 64),
                                   down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                                   up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
                                   cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8)  # fmt: skip
        return {"denoiser": net, "text_encoder": CLIPTextModel(config)}
    net = SD3Transformer2DModel(sample_size=16, patch_size=2, in_channels=3, out_channels=3, num_layers=4,
                                attention_head_dim=24, num_attention_heads=4, joint_attention_dim=64,
                                caption_projection_dim=96, pooled_projection_dim=64, pos_embed_max_size=8)  # fmt: skip
    return {"denoiser": net, "text_encoder": CLIPTextModelWithProjection(config)}


def fresh(kind: str, seed: int) -> Base:
    torch.manual_seed(seed)
    words = tokenizer()
    return Base(
        f"lab/{kind}", modules(kind, len(words)), {"tokenizer": words, "scheduler": SCHEDULERS[kind]}, sha256={"-": "-"}
    )


def pictures(plan: Plan) -> tuple[Tensor, list[str]]:
    made = sprites.scenes("train", plan.scenes, plan.seed)
    return torch.from_numpy(np.stack([sprites.render(s) for s in made])), [s.caption() for s in made]


def right(base: Base, n: int = 96, split: str = "test", sampler: Sampler | None = None) -> dict[str, float]:
    """Shares of samples that show what the caption says: factor by factor, `all` (shape, colour and place at once), and,
    `named`, those three by a second judge."""
    asked = sprites.scenes(split, n, 1)
    made = denoise(base, [s.caption() for s in asked], sampler, seed=0)
    seen = [sprites.factors(s) for s, _ in sprites.recognise(made.pixels.numpy())]
    want = [sprites.factors(s) for s in asked]
    share = lambda *names: sum(all(a[k] == b[k] for k in names) for a, b in zip(seen, want, strict=True)) / n
    return {k: share(k) for k in want[0]} | {"all": share("shape", "colour", "place"), "named": named(asked, made.pixels)}


@torch.no_grad()
def named(asked: list[sprites.Scene], pixels: Tensor, judge: str = "lab/clip-b") -> float:
    """Share of pictures of whose shape, colour and place an image-text encoder tells the one asked from its alternatives."""
    eye = frozen(judge, str(pixels.device), "judge")
    right = torch.ones(len(asked), dtype=torch.bool, device=pixels.device)
    for factor in ("shape", "colour", "place"):
        captions, true = zip(*(sprites.alternatives(s, factor) for s in asked), strict=True)
        said = see.fits(eye.model, eye, resized(pixels, size_of(eye)), captions)
        right &= said.argmax(-1) == torch.tensor(true, device=pixels.device)
    return float(right.float().mean())


def train(base: Base, plan: Plan, tell=lambda line, found: None) -> None:
    """In place; at the end the modules are the running mean."""
    pixels, captions = pictures(plan)
    denoiser = Denoiser.of(base)
    params = [p for m in base.components.values() for p in m.parameters()]
    mean = [p.detach().clone() for p in params]
    stepper = torch.optim.AdamW(params, lr=plan.rate, weight_decay=0.01, betas=(0.9, 0.99))
    began, said, step, share = time.monotonic(), 0.0, 0, 0.0
    for step in range(plan.steps):
        share = max(step / plan.steps, (time.monotonic() - began) / (60 * plan.minutes))
        if share >= 1:
            break
        for group in stepper.param_groups:
            group["lr"] = plan.rate * min((step + 1) / plan.warmup, 0.5 + 0.5 * np.cos(np.pi * share))
        ids = torch.arange(step * plan.rows, (step + 1) * plan.rows)
        rows = draws.randint(len(pixels), plan.seed, "generator/rows", 0, ids)
        silent = draws.uniform(plan.seed, "generator/unsaid", 0, ids) < plan.unsaid
        read = denoiser.encode(["" if q else captions[r] for r, q in zip(rows.tolist(), silent.tolist(), strict=True)])
        x, n = denoiser.latents(pixels[rows]), draws.normal(plan.seed, "generator/noise", 0, ids, denoiser.shape)
        t = denoiser.process.times(draws.uniform(plan.seed, "generator/time", 0, ids))
        a, s = (v.view(-1, 1, 1, 1) for v in denoiser.process.scales(t))
        loss = (denoiser(a * x + s * n, t, read) - denoiser.process.target(x, n, t)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(mean, params, 1 - min(plan.mean, (step + 1) / (step + 10)))
        if time.monotonic() - said > 120:
            said = time.monotonic()
            live = [p.detach().clone() for p in params]
            swap(params, mean)
            tell(f"step {step} {(said - began) / 60:.1f} min loss {float(loss.detach()):.4f}", right(base))
            swap(params, live)
    swap(params, mean)


@torch.no_grad()
def swap(params: list[Tensor], values: list[Tensor]) -> None:
    for p, v in zip(params, values, strict=True):
        p.copy_(v)


def save(base: Base, kind: str, folder: Path, found: dict[str, float], plan: Plan) -> None:
    encoder = type(base.components["text_encoder"]).__name__
    index = {"_class_name": PIPELINES[kind], "unet" if kind == "unet" else "transformer":
             ["diffusers", type(base.components["denoiser"]).__name__], "text_encoder": ["transformers", encoder],
             "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
             "scheduler": ["diffusers", SCHEDULERS[kind]["_class_name"]]}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("unet", "transformer"):
        if name in index:
            copy.deepcopy(base.components["denoiser"]).half().save_pretrained(folder / name)
    copy.deepcopy(base.components["text_encoder"]).half().save_pretrained(folder / "text_encoder")
    base.processors["tokenizer"].save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[kind], indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for config in folder.glob("*/config.json"):  # where it was loaded from is nobody's business
        told = json.loads(config.read_text())
        told.pop("_name_or_path", None)
        config.write_text(json.dumps(told, indent=2) + "\n")
    count = sum(p.numel() for m in base.components.values() for p in m.parameters())
    said = ", ".join(f"{k} {100 * v:.0f} %" for k, v in found.items())
    (folder / "README.md").write_text(
        f"# lab/{kind}\n\nA tiny text-to-image model of the sprite world, made for tests and experiments: 16 x 16 pixels, "
        f"{count:,} parameters, fp16.\nTrained by `python -m temperament.bases.train_diffusion {kind}` with seed {plan.seed}. "
        f"Of 400 samples for captions held out of training, these\nshow what was asked (all: shape, colour and place at once): "
        f"{said}.\n\n{JUDGE}\n\nLicence: Apache-2.0.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=sorted(PIPELINES))
    parser.add_argument("--minutes", type=float, default=Plan.minutes)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--rate", type=float, default=Plan.rate)
    parser.add_argument("--out", type=Path, default=LAB)
    parser.add_argument("--go-on", action="store_true", help="from the weights that lie in --out, with draws of its own")
    given = parser.parse_args()
    plan = Plan(minutes=given.minutes, steps=given.steps, rate=given.rate, seed=int(given.go_on))
    base = load(given.out / given.kind) if given.go_on else fresh(given.kind, plan.seed)
    folder = given.out / given.kind

    def tell(line: str, found: dict[str, float]) -> None:
        print(line, found, flush=True)
        save(base, given.kind, folder, found, plan)

    train(base, plan, tell)
    found = right(base, 400)
    print(found, flush=True)
    save(base, given.kind, folder, found, plan)


if __name__ == "__main__":
    main()
