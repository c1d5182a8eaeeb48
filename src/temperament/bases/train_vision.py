"""Train the lab's image bases: `python -m temperament.bases.train_vision vit|cnn|clip|clip-b`, a few minutes each on one core.

    vit, cnn        the shape of the one subject of a scene, by cross-entropy
    clip, clip-b    scenes and their captions, by contrast: a batch is scenes of one or two subjects, each beside an edit of it
                    that differs in one factor, so that every word must be read; two seeds, of which one may judge the other

Scenes are of the training split only, rendered once (the world displaces subjects itself); noise and dimming are drawn anew
at each step. What lies beyond (other colours, strong corruptions) is left to be adapted to. A fixed seed; the folder under
`lab/` is written with its card, and what that says was measured on the weights as shipped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temperament.bases.worlds import sprites
from temperament.bases.worlds.draw import Draw
from temperament.nn import draws

LAB = Path(__file__).parent / "lab"
SHAPES = tuple(sprites.SHAPES)


@dataclass(frozen=True)
class Plan:
    """How a base is made. scenes: rendered for training; rows: scenes of a step; noise: the most (spread, in 0..1)."""

    make: Callable[[], nn.Module]
    words: bool = False
    scenes: int = 8000
    steps: int = 2500
    rows: int = 96
    rate: float = 1e-3
    noise: float = 0.12
    seed: int = 0


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**TOWER, **named(SHAPES)))


def cnn() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 48, "hidden_sizes": [64, 128], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, downsample_in_first_stage=False, **named(SHAPES)))


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    words = vocabulary()
    ids = {f"{name}_token_id": words.index(f"<{name}>") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 64}
    text = CLIPTextConfig(vocab_size=len(words), num_hidden_layers=2, max_position_embeddings=24, **sizes, **ids)
    vision = CLIPVisionConfig(**(TOWER | sizes), hidden_act="gelu")
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


TOWER = {"image_size": sprites.SIZE, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "intermediate_size": 192}  # fmt: skip
PLANS = {
    "vit": Plan(vit, steps=9000),
    "cnn": Plan(cnn, steps=3000),
    "clip": Plan(clip, words=True, scenes=20_000, steps=6500, rows=64, rate=2e-3),
    "clip-b": Plan(clip, words=True, scenes=20_000, steps=6500, rows=64, rate=2e-3, seed=1),
}


def named(classes: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}


# ---- words -----------------------------------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    return ["<pad>", "<bos>", "<eos>", "<unk>", *sprites.vocabulary()]


def tokenizer() -> Any:
    """A word is a token; <bos> before, <eos> after."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {w: i for i, w in enumerate(vocabulary())}
    made = Tokenizer(models.WordLevel(ids, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])]
    made.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **special, clean_up_tokenization_spaces=False, model_max_length=24, padding_side="right"
    )


def read(tok: Any, captions: list[str]) -> dict[str, Tensor]:
    return dict(tok(captions, padding="max_length", truncation=True, max_length=24, return_tensors="pt"))


# ---- pictures --------------------------------------------------------------------------------------------------------------


def rendered(scenes: list[sprites.Scene]) -> Tensor:
    """(scenes, 3, 16, 16) uint8."""
    return (torch.from_numpy(np.stack([sprites.render(s) for s in scenes])) * 255).round().to(torch.uint8)


def seen(pixels: Tensor, plan: Plan, step: int, mixed: bool) -> Tensor:
    """uint8 -> -1..1, each row dimmed and noisy by amounts of its own; its colours mixed, where none is asked for."""
    rows, n, x = torch.arange(len(pixels)), len(pixels), pixels.float() / 255
    if mixed:
        share = draws.uniform(plan.seed, "vision/share", step, rows).view(n, 1, 1)
        other = (3 * draws.normal(plan.seed, "vision/colours", step, rows, (3, 3))).softmax(-1)
        x = torch.einsum("nij,njhw->nihw", (1 - share) * torch.eye(3) + share * other, x)
    dim, loud = (draws.uniform(plan.seed, f"vision/{p}", step, rows).view(n, 1, 1, 1) for p in ("dim", "loud"))
    noise = draws.normal(plan.seed, "vision/noise", step, rows, tuple(x.shape[1:]))
    return ((x * (1 - 0.2 * dim) + plan.noise * loud * noise).clamp(0, 1) - 0.5) / 0.5


def plain(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - 0.5) / 0.5


def pairs(plan: Plan) -> tuple[list[sprites.Scene], list[sprites.Scene]]:
    """Scenes of one or two subjects, and of each an edit that is of the training split as well."""
    scenes = sprites.scenes("train", plan.scenes, 77 + plan.seed, subjects=(1, 2))
    others = []
    for i, scene in enumerate(scenes):
        draw = Draw("vision/edits", plan.seed, i)
        new = [s for s in SHAPES if s not in {who.shape for who in scene.subjects}]
        one = lambda s=scene, d=draw, n=new: sprites.edit(s, d)[1] if d.chance(0.5) else reshaped(s, d.choice(n))
        while (other := one()).split != "train":
            continue
        others.append(other)
    return scenes, others


def reshaped(scene: sprites.Scene, shape: str) -> sprites.Scene:
    """Another shape for the first subject: what `edit` never changes."""
    return replace(scene, subjects=(replace(scene.subjects[0], shape=shape), *scene.subjects[1:]))


# ---- training --------------------------------------------------------------------------------------------------------------


def train(plan: Plan) -> nn.Module:
    torch.manual_seed(plan.seed)
    model = plan.make()
    loss = contrast(plan) if plan.words else shapes(plan)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    stepper = torch.optim.AdamW(groups, lr=plan.rate)
    model.train()  # the statistics of a BatchNorm are those of its training
    for step in range(plan.steps):
        for group in stepper.param_groups:
            group["lr"] = plan.rate * min((step + 1) / 100, (1 - step / plan.steps) * 1.25, 1.0)
        value = loss(model, step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        if step % 100 == 0:
            say(f"step {step} loss {value.item():.3f}")
    return model.eval()


say: Callable[[str], None] = lambda text: None


def shapes(plan: Plan) -> Callable[[nn.Module, int], Tensor]:
    """Cross-entropy over the shapes that training shows in the colours of a picture: one that is held out with them is no
    wrong answer, or the network would learn from the colours what a picture never is."""
    scenes = sprites.scenes("train", plan.scenes, 77 + plan.seed)
    pixels, labels = rendered(scenes), torch.tensor([SHAPES.index(s.subjects[0].shape) for s in scenes])
    shown = torch.tensor([[reshaped(s, name).split == "train" for name in SHAPES] for s in scenes])

    def loss(model: nn.Module, step: int) -> Tensor:
        rows = draws.randint(len(scenes), plan.seed, "vision/rows", step, torch.arange(plan.rows))
        logits = model(pixel_values=seen(pixels[rows], plan, step, mixed=True)).logits
        return F.cross_entropy(logits.masked_fill(~shown[rows], -30.0), labels[rows])

    return loss


def contrast(plan: Plan) -> Callable[[nn.Module, int], Tensor]:
    """Symmetric InfoNCE; every third batch says no colours and no background and shows them mixed, so that shapes are read
    apart from the colours they came with."""
    both, tok = pairs(plan), tokenizer()
    pixels = torch.stack([rendered(s) for s in both], 1)  # (scenes, 2, 3, 16, 16)
    full, part = (
        torch.stack([read(tok, [say(s) for s in half])["input_ids"] for half in both], 1)
        for say in (sprites.Scene.caption, colourless)
    )

    def loss(model: nn.Module, step: int) -> Tensor:
        rows, blind = draws.randint(len(full), plan.seed, "vision/rows", step, torch.arange(plan.rows)), step % 3 == 2
        words = (part if blind else full)[rows].flatten(0, 1)
        words = words[:, : int((words != 0).sum(1).max())]
        x = seen(pixels[rows].flatten(0, 1), plan, step, mixed=blind)
        out = model(input_ids=words, attention_mask=(words != 0).long(), pixel_values=x)
        same = (words[:, None] == words[None]).all(-1)  # a caption that comes twice fits both pictures
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(out.logits_per_image, target) + F.cross_entropy(out.logits_per_text, target)) / 2

    return loss


def colourless(scene: sprites.Scene) -> str:
    words = scene.caption().rpartition(" on ")[0].split()
    return " ".join(w for w in words if w not in sprites.COLOURS)


# ---- what came of it -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(model: nn.Module, plan: Plan, n: int = 600) -> dict[str, float]:
    """Share of held-out scenes that are right: of each factor, and in corrupted and recoloured pictures of them."""
    scenes = sprites.scenes("test", n, 0)
    images = np.stack([sprites.render(s) for s in scenes])
    worlds = {"plain": images, "colours shifted": np.stack([sprites.shift_colours(i) for i in images])}
    for kind in sprites.CORRUPTIONS:
        worlds[f"{kind}, severity 4"] = np.stack(
            [sprites.corrupt(i, kind, 4, Draw("measured", kind, k)) for k, i in enumerate(images)]
        )
    batches = {name: (torch.from_numpy(w) - 0.5) / 0.5 for name, w in worlds.items()}
    if not plan.words:
        truth = torch.tensor([SHAPES.index(s.subjects[0].shape) for s in scenes])
        return {name: float((model(pixel_values=x).logits.argmax(-1) == truth).float().mean()) for name, x in batches.items()}
    tok, found = tokenizer(), {}
    of = lambda x: F.normalize(pooled(model.get_image_features(pixel_values=x)), dim=-1)
    say_ = lambda texts: F.normalize(pooled(model.get_text_features(**read(tok, texts))), dim=-1)
    for factor in sprites.FACTORS:
        asked = [sprites.alternatives(s, factor) for s in scenes]
        k = len(asked[0][0])
        texts = say_([c for options, _ in asked for c in options]).view(n, k, -1)
        right = torch.tensor([r for _, r in asked])
        for name, x in (batches if factor == "shape" else {"plain": batches["plain"]}).items():
            best = (texts @ of(x)[..., None])[..., 0].argmax(1)
            found[factor if name == "plain" else f"{factor}, {name}"] = float((best == right).float().mean())
    two = sprites.scenes("test", n, 0, subjects=(2,))
    texts, pictures = say_([s.caption() for s in two]), of(plain(rendered(two)))
    captions = np.array([s.caption() for s in two])
    best = (pictures.view(-1, 50, 64) @ texts.view(-1, 50, 64).mT).argmax(-1) + torch.arange(0, n, 50)[:, None]
    found["caption of two subjects, of 50"] = float((captions[best.flatten().numpy()] == captions).mean())
    return found


def pooled(features: Any) -> Tensor:
    return getattr(features, "pooler_output", features)


CARD = """# {name}

A lab base of temperament: {parameters:,} parameters, {what}. Pictures are 16x16, of the sprite world
(`bases/worlds/sprites.py`). Apache-2.0; trained on pictures made by a program. Only for experiments.

## Training
{scenes:,} scenes of the training split{more}, {steps:,} steps of {rows} rows, AdamW, seed {seed}, {seconds:.0f} s on a CPU
core; rebuilt by `python -m temperament.bases.train_vision {name}`.

## What it can do
Share of {n} held-out scenes ({held}) that it gets right.

| what | right |
|---|---|
{table}

## What it cannot do
{limits}
"""
WORDS = {
    "vit": "a vision transformer (4 blocks, patches of 4x4) that names the shape of a subject",
    "cnn": "a residual network with BatchNorm that names the shape of a subject",
    "clip": "an image encoder and a text encoder in one space; `clip` and `clip-b` differ in their seed alone",
}
LIMITS = {
    False: "- Any other question than which of the six shapes; other colours, and corruptions, as the table says.\n"
    "- Figures by number, digits: its classes do not know them, and a head for them must be taught.",
    True: "- Words that are not in the world's captions: each is <unk>.\n- Other colours, and corruptions, as the table says.",
}


def install(name: str, model: nn.Module, plan: Plan, seconds: float, folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    half = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2, "do_rescale": True}
    kind = "CLIPImageProcessor" if plan.words else "ViTImageProcessor"
    told = {"image_processor_type": kind, **size, **half, "rescale_factor": 1 / 255, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(told, indent=1) + "\n")
    if plan.words:
        tokenizer().save_pretrained(folder)
    found = measured(model.float(), plan)
    (folder / "measured.json").write_text(json.dumps(found, indent=1) + "\n")
    table = "\n".join(f"| {t} | {100 * v:.1f} % |" for t, v in found.items())
    numbers = {k: getattr(plan, k) for k in ("scenes", "steps", "rows", "seed")}
    size_ = sum(p.numel() for p in model.parameters())
    more = " with one or two subjects, each beside an edit of it" if plan.words else ""
    held = "combinations of shape, colour and background that no training saw"
    words, limits = WORDS[name.removesuffix("-b")], LIMITS[plan.words]
    card = CARD.format(name=name, parameters=size_, what=words, more=more, n=600, held=held, table=table, limits=limits,
                       seconds=seconds, **numbers)  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
    return found


def main() -> None:
    global say
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(PLANS))
    parser.add_argument("--to", type=Path)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    say = lambda text: print(text, flush=True)
    plan = PLANS[args.name]
    plan, began = replace(plan, steps=args.steps or plan.steps), time.process_time()
    model = train(plan)
    seconds = time.process_time() - began
    say(f"{seconds:.0f} s: {install(args.name, model, plan, seconds, args.to or LAB / args.name)}")


if __name__ == "__main__":
    main()
