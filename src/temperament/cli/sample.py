"""Let a generator paint captions.

    temper sample lab/unet "a red cross at the top left on navy" --n 4 --out pictures
    temper sample runs/first --file captions.txt --beside --steps 50 --guidance 5
    temper sample runs/first --scenes 8 --set 'inference=[{sample.rl_guidance: {weight: 1.5}}]'

MODEL is a lab base, a folder, a Hugging Face id, a run (with its inference parts) or an adapter. Every picture becomes a PNG
file, and all of them one sheet: a caption a row. Equal seed, equal pictures, whatever the batch; --beside puts what the base
alone paints from the same noise to the left of what the tuned model does. --set changes the inference parts for this once,
written as in a recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("model", "lab/unet, a folder, a Hugging Face id, a run or an adapter", "MODEL"),
    Opt("captions", "what is to be seen; quote what has blanks", "CAPTION", many=True, shown="--file or --scenes"),
    Opt("--file", "captions, one a line", "FILE"),
    Opt("--scenes", "so many scenes of the sprite world, for lab bases; what the pictures show is told", "N", int, 0),
    Opt("--n", "pictures of each caption", "N", int, 1),
    Opt("--steps", "calls of the network", "N", int, shown="the system's own, else 20"),
    Opt("--guidance", "how strongly the caption is followed; 1: as it is", "G", float, shown="the system's own, else 3"),
    Opt("--eta", "0 certain, 1 every step drawn", "ETA", float, shown="the system's own, else 0"),
    Opt("--seed", "every draw follows from it", "N", int, 0),
    Opt("--set", "change the inference parts: inference=[PART], or inference.0.PART.OPTION=VALUE", "KEY=VALUE", many=True),
    Opt("--beside", "also what the base alone paints, beside each"),
    Opt("--out", "new folder for the files", "DIR", shown="runs/pictures-..."),
    Opt("--batch", "pictures painted together", "N", int, 16),
    Opt("--device", "auto, cpu or cuda", "DEVICE", default="auto"),
    Opt("--quiet", "no progress, only the result"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.cli.app import need
    from temperament.cli.live import Live
    from temperament.run.artefacts import address
    from temperament.run.export import free

    captions = [*a.captions, *(_lines(a.file) if a.file else ())]
    if not captions and not a.scenes:
        need("sample", a, "captions")
    if a.out:
        free(a.out, "--out")
    how = {k: getattr(a, k) for k in ("scenes", "n", "steps", "guidance", "eta", "seed", "beside")}
    out = a.out or Path("runs") / f"pictures-{address(a.model, captions, a.set, how)[:12]}"
    with Live(say) as tell:
        return api.sample(
            a.model, captions, **how, overrides=a.set or (), batch=a.batch, device=a.device, out=out, tell=tell
        )


def _lines(file: str) -> list[str]:
    from temperament.errors import UserError

    try:
        found = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        why = getattr(problem, "strerror", None) or "not UTF-8"
        raise UserError("--file", file, f"it cannot be read as text ({why})") from None
    if not found:
        raise UserError("--file", file, "it holds no caption; write one a line")
    return found


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    rows = [p for p in data["pictures"] if p["of"] == "model"]
    if rows and "shows" in rows[0]:
        right = sum(p["caption"] == p["shows"] for p in rows)
        say.table(["caption", "shows", "file"], [[p["caption"], p["shows"], Path(p["file"]).name] for p in rows])
        say.note(f"{right} of {len(rows)} show exactly what was asked.")
    else:
        say.table(["caption", "file"], [[p["caption"], Path(p["file"]).name] for p in rows])
    say.out.print(f"[dim]sheet    [/dim] {data['sheet']}", soft_wrap=True)
