"""[062] Style injection: a style set in by attention weighs content and style better than statistics of the noise alone.

Contents and styles are scenes of the sprite world that the lab generator never saw, of unlike colours and backgrounds, walked
back to noise. Compared: (1 + style) (1 + layout), as ArtFID weighs the two: style, the distance of the colours' mean and
covariance (Gram) to those of the style picture; layout, the share of the content's mask that is not where it was. Baseline:
AdaIN of the two noises and plain sampling from there. Recorded: the same for the content as it is, and without AdaIN or with
temperature 1.
"""

from dataclasses import replace

import torch

from temperament.bases.load import load
from temperament.bases.worlds import sprites
from temperament.engine.denoise import Denoiser, Sampler, denoise, invert
from temperament.engine.pictures import png_bytes
from temperament.methods.sample.style_injection import StyleInjection, adain
from temperament.run.claims import Claim

PAIRS, HOW, REFINE = 24, Sampler(20, 0.0, 1.0), 5


def pictures(seed):
    """(contents, styles) of scenes: unlike in colour, background and place."""
    found, pool = [], iter(sprites.scenes("test", 60 * PAIRS, 10 + seed))
    while len(found) < PAIRS:
        a, b = next(pool), next(pool)
        fa, fb = sprites.factors(a), sprites.factors(b)
        if all(fa[k] != fb[k] for k in ("colour", "background", "place")):
            found.append((a, b))
    return [s for s, _ in found], [s for _, s in found]


def rendered(scenes):
    return torch.stack([torch.from_numpy(sprites.render(s)) for s in scenes])


def gram(x):
    """(rows, 3, H, W) -> (rows, 12): mean and covariance of the colours."""
    flat = x.flatten(2)
    centred = flat - flat.mean(2, keepdim=True)
    return torch.cat([flat.mean(2), (centred @ centred.transpose(1, 2) / flat.shape[2]).flatten(1)], 1)


def measured(made, styles, masks):
    """Distances of pictures to the styles, and the share of the content's mask that the figure is no longer on."""
    style = (gram(made) - gram(styles)).norm(dim=1)
    border = torch.stack([made[..., 0, :], made[..., -1, :]], -1).flatten(2).median(2).values[..., None, None]
    far = (made - border).norm(dim=1)
    seen = far > 0.5 * far.flatten(1).amax(1)[:, None, None]
    layout = 1 - (seen & masks).flatten(1).sum(1) / (seen | masks).flatten(1).sum(1).clamp(min=1)
    return {"art": float(((1 + style) * (1 + layout)).mean()), "style": float(style.mean()), "layout": float(layout.mean())}


def run(seed, lab):
    base = load("lab/unet")
    contents, styles = pictures(seed)
    for kind, scenes in (("content", contents), ("style", styles)):
        (lab.folder / f"{kind}-{seed}").mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(rendered(scenes)):
            (lab.folder / f"{kind}-{seed}" / f"{i:02d}.png").write_bytes(png_bytes(picture))
    masks = torch.stack([torch.from_numpy(sprites.masks(s)[0]) for s in contents])
    judged = lambda made: measured(made, rendered(styles), masks)
    part = StyleInjection(str(lab.folder / f"style-{seed}"), str(lab.folder / f"content-{seed}"), refine=REFINE)
    injected = lambda p: judged(denoise(base, [""] * PAIRS, HOW, hooks=p.hooks(base)).pixels)
    denoiser = Denoiser.of(base)
    ours, theirs = (invert(base, denoiser.latents(rendered(s)), steps=HOW.steps, refine=REFINE) for s in (contents, styles))
    alone = judged(denoise(base, [""] * PAIRS, HOW, start=adain(ours, theirs)).pixels)
    more = {"content": judged(rendered(contents))["art"], "no AdaIN": injected(replace(part, adain=False))["art"],
            "temperature 1": injected(replace(part, temperature=1.0))["art"]}  # fmt: skip
    return {"method": injected(part) | more, "baseline": alone}


claim = Claim(
    paper="062",
    title="Style Injection in Diffusion: A Training-free Approach for Adapting Large-scale Diffusion Models for Style Transfer",
    says="Queries of the content with keys and values of the style, in the decoder's self-attention, weigh style against "
    "content better than statistics of the noise alone.",
    parts=("sample.style_injection",),
    measure="art",
    better="lower",
    baseline="AdaIN of the two noises, attention untouched",
    run=run,
    note="colours are the whole style of this world, and its figures cover a fifth of a picture: textures would tell more",
)
