"""Pictures of captions, from any generator, or from the system that a run ended with; as files and one sheet of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from temperament import parts
from temperament.bases.load import Base
from temperament.bases.worlds import sprites
from temperament.engine.denoise import Denoiser, Sampler
from temperament.engine.measure import Pure, System
from temperament.engine.pictures import png_bytes, sheet
from temperament.errors import UserError
from temperament.run import recipe as schema
from temperament.run.reopen import subject

NAMED = "sample.sampler"


def sample(
    model: Any,
    captions: str | Sequence[str] = (),
    *,
    scenes: int = 0,
    n: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    seed: int = 0,
    overrides: Iterable[str] = (),
    beside: bool = False,
    batch: int = 16,
    device: str = "auto",
    out: str | Path | None = None,
    tell: Callable[..., None] = lambda event, **data: None,
) -> dict[str, Any]:
    """{"model", "seed", "inference", "pictures": [{"caption", "number", "of", "pixels" (3, H, W) in 0..1 or "file"}], "sheet"}.

    scenes: so many captions of the sprite world that no training picture had. n: pictures of each caption. steps, guidance,
    eta: instead of the system's own. overrides: of its inference parts, as KEY=VALUE of a recipe. beside: also what the base
    alone paints from the same noise. Row i of all is painted from noise i of the seed, whatever the batch. out: a folder for
    the files and their sheet."""
    asked = ([captions] if isinstance(captions, str) else list(captions)) + [s.caption() for s in shown(scenes)]
    for field, value in (("--n", n), ("--batch", batch)):
        if value < 1:
            raise UserError(field, value, "give at least 1")
    if not asked:
        raise UserError("captions", list(captions), "say what is to be seen, e.g. 'a red cross at the top left on navy'")
    base = subject(model, device)
    inference = inferring(base, overrides, {"steps": steps, "guidance": guidance, "eta": eta})
    wanted = [c for c in asked for _ in range(n)]
    views = [("model", System(base, inference, batch, seed))]
    if beside:
        if not (base.originals or base.hung or base.inference):
            raise UserError("--beside", base.id, "it is a base with nothing on it; name a run or an adapter")
        how = [p for p in inference if getattr(p, "sampler", None) is not None]
        views.insert(0, ("base", System(base, how, batch, seed, model=Pure(base))))
    pictures: list[dict[str, Any]] = []
    for name, system in views:
        for at in range(0, len(wanted), batch):
            tell("measure", skill=f"pictures of the {name}", done=at, total=len(wanted))
            made = system.paint(wanted[at : at + batch], torch.arange(at, min(at + batch, len(wanted))))
            pictures += [_told(c, (at + i) % n, name, made[i]) for i, c in enumerate(wanted[at : at + batch])]
    if scenes:
        eye = sprites.recognise(torch.stack([p["pixels"] for p in pictures]).numpy())
        for p, (seen, _) in zip(pictures, eye, strict=True):
            p["shows"] = seen.caption()
    told = {"model": base.id, "seed": seed, "inference": parts.plain(inference), "pictures": pictures}
    return told if out is None else told | {"out": str(out), "sheet": write(pictures, len(views), n, Path(out))}


def shown(scenes: int) -> list[sprites.Scene]:
    if scenes < 0:
        raise UserError("--scenes", scenes, "give 0 or more")
    return sprites.scenes("test", scenes, 1)


def inferring(base: Base, overrides: Iterable[str], how: dict[str, Any]) -> list[Any]:
    """The inference parts of the system, with entries overridden, and the sampler's own numbers in a sampler."""
    document = {"base": base.id, "inference": parts.plain(list(base.inference))}
    inference = schema.read(document, overrides).inference
    given = {k: v for k, v in how.items() if v is not None}
    if not given:
        return inference
    known = next((p.sampler for p in inference if getattr(p, "sampler", None) is not None), None)
    known = known or Sampler.usual(Denoiser.of(base).process)
    try:
        made = replace(known, **given)
        sampler = parts.build({NAMED: {"steps": made.steps, "eta": float(made.eta), "guidance": float(made.guidance)}})
    except UserError as problem:
        bad = next(iter(k for k in ("steps", "eta") if k in given), "guidance")
        raise UserError(f"--{bad}", given[bad], problem.mend) from None
    return [sampler, *(p for p in inference if getattr(p, "sampler", None) is None)]


def write(pictures: list[dict[str, Any]], views: int, n: int, out: Path) -> str:
    """Each picture as a file of its own, in place of its pixels, and the sheet: a caption a row, the base's first."""
    out.mkdir(parents=True, exist_ok=True)
    rows = len(pictures) // (views * n)
    pixels = torch.stack([p["pixels"] for p in pictures]).unflatten(0, (views, rows, n)).transpose(0, 1).flatten(1, 2)
    for i, p in enumerate(pictures):
        name = f"{i % (rows * n) // n:03d}-{p['number']}{'-base' if p['of'] == 'base' else ''}.png"
        (out / name).write_bytes(png_bytes(p.pop("pixels")))
        p["file"] = str(out / name)
    (out / "sheet.png").write_bytes(png_bytes(sheet(pixels)))
    return str(out / "sheet.png")


def _told(caption: str, number: int, of: str, pixels: Tensor) -> dict[str, Any]:
    return {"caption": caption, "number": number, "of": of, "pixels": pixels}
