from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from temperament.engine import see
from temperament.engine.encoded import Encoded
from temperament.engine.examples import Captioned, Origin
from temperament.engine.pictures import Picture, Stream
from temperament.engine.rows import BadRow, Rows, fingerprint, held_out, read_rows
from temperament.errors import Unusable, UserError
from temperament.parts import part, plain

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


@part("data.folder_images", modalities=("image",))
@dataclass(frozen=True)
class FolderImages:
    """Images of a folder with captions or classes: `metadata.jsonl` (or .csv) with `file_name` and `text` or `label`, a .txt
    beside each, or a sub-folder for each class.

    Every image is opened and checked before anything is trained: one that is missing, damaged, too small, or lies outside
    of the folder is named with its line. The images themselves are loaded when a batch needs them.
    """

    path: str  # the folder
    on_bad: Literal["stop", "skip"] = "stop"  # what to do about images or captions that cannot be used
    limit: int | None = None  # images read at most
    smallest: int = 8  # pixels an image must have on its shorter side
    caption: str = ""  # of images that have none: what every one of them shows
    holdout: float | None = None  # share kept out of training; null: one in ten where images have classes, else none
    role: Literal["target", "retained", ""] = ""  # what the ledger calls what is held out; default: target

    yields: ClassVar = ("Images",)

    def __post_init__(self):
        if self.holdout is not None and not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must lie in [0, 1), not {self.holdout}")

    @property
    def called(self) -> str:
        return Path(self.path).expanduser().resolve().name

    def classes(self, base: Any = None) -> list[str]:
        """The classes of its images, in the base's own order where they are all the base's."""
        named, own = sorted({e.label for e in self._rows if e.label}), see.own_classes(base) if base is not None else []
        if not named:
            raise UserError("data.folder_images", self.path, "its images have no classes; put each class in a sub-folder")
        return own if set(named) <= set(own) else named

    def held(self, base: Any = None) -> list[Picture]:
        return self._pictures(self._split[1], base)

    def pictures(self, ctx: Any) -> list[Picture]:
        return self._pictures(self._split[0], ctx.base)

    def open(self, ctx: Any) -> Stream:
        if self._labelled:
            see.must_know(ctx, self.classes(ctx.base), "data.folder_images")
        return Stream(self._pictures(self._split[0], ctx.base), ctx, "folder_images")

    def suites(self) -> list[dict]:
        return [{"evaluate.pictures": {"of": plain(self), "role": self.role}}] if self._labelled and self._split[1] else []

    @property
    def _labelled(self) -> bool:
        return any(e.label for e in self._rows)

    @cached_property
    def _rows(self) -> Rows:
        return self.read()

    @cached_property
    def _split(self) -> tuple[list[Captioned], list[Captioned]]:
        return held_out(list(self._rows), (0.1 if self._labelled else 0.0) if self.holdout is None else self.holdout)

    def _pictures(self, some: Sequence[Captioned], base: Any) -> list[Picture]:
        number = {c: i for i, c in enumerate(self.classes(base))} if self._labelled else {}
        name = lambda e: Path(e.image).relative_to(Path(self.path).expanduser().resolve()).as_posix()
        return [Picture(e.image, e.text, number.get(e.label, -1), name(e)) for e in some]

    def fingerprint(self) -> str:
        return fingerprint(self.path)

    def read(self) -> Rows:
        """Captioned examples whose `image` is the absolute path of a file that opens."""
        try:
            from PIL import Image
        except ImportError:
            raise UserError("data.folder_images", self.path, "it needs Pillow; pip install 'temperament[images]'") from None
        folder = Path(self.path).expanduser().resolve()
        if not folder.is_dir():
            raise UserError("data.folder_images.path", self.path, "no such folder")
        table = next((folder / n for n in ("metadata.jsonl", "metadata.csv") if (folder / n).is_file()), None)
        rows = read_rows(table, on_bad=self.on_bad, limit=self.limit, shape="captioned") if table else self._beside(folder)
        good, bad = [], list(rows.bad)
        for example in rows:
            if not isinstance(example.image, str):
                bad.append(BadRow(example.origin, "file_name is not a path"))
                continue
            file = (folder / example.image).resolve()
            if why := self._wrong(folder, file, Image):
                bad.append(BadRow(example.origin, f"{example.image}: {why}"))
            else:
                good.append(replace(example, image=str(file)))
        if bad and (self.on_bad == "stop" or not good):
            mend = f"{bad[0].reason} ({len(bad)} of {len(rows) + len(rows.bad)} rows bad); mend it, or say on_bad: skip"
            raise Unusable(str(bad[0].origin), "an image that cannot be used", mend)
        named = {e.image for e in good} | {str((folder / e.image).resolve()) for e in rows if isinstance(e.image, str)}
        unnamed = sorted(str(p.relative_to(folder)) for p in _images(folder) if str(p.resolve()) not in named)
        notes = [f"{len(unnamed)} images have no caption and are not used, e.g. {unnamed[0]}"] if unnamed else []
        return Rows(tuple(good), "captioned", rows.columns, tuple(bad), (*rows.notes, *notes))

    def _wrong(self, folder: Path, file: Path, Image) -> str | None:
        if not file.is_relative_to(folder):
            return "it lies outside of the folder"
        if not file.is_file():
            return "no such file"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file, formats=FORMATS) as image:
                    image.verify()  # checksums; the file must then be opened anew
                with Image.open(file, formats=FORMATS) as image:
                    image.load()
                    if min(image.size) < self.smallest:
                        return f"it is {image.size[0]} x {image.size[1]} pixels, and {self.smallest} are needed"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
            return f"it cannot be opened ({str(e)[:80] or type(e).__name__})"
        return None

    def _beside(self, folder: Path) -> Rows:
        """image.png with image.txt, or class/image.png."""
        good, bad, images = [], [], _images(folder)
        inside = {p.relative_to(folder).parts[0] for p in images if p.parent != folder}
        if len(inside) > 1 and not any(p.with_suffix(".txt").is_file() for p in images):
            classed = [p for p in images if p.parent != folder][: self.limit]
            named = [(str(p.relative_to(folder)), p.relative_to(folder).parts[0]) for p in classed]
            good = [Captioned(f, c, c, origin=Origin(str(folder / f), n + 1, "image")) for n, (f, c) in enumerate(named)]
            return Rows(tuple(good), "captioned", ("image", "label"), ())
        for n, image in enumerate(images[: self.limit]):
            caption, origin = image.with_suffix(".txt"), Origin(str(image), n + 1, "image")
            try:
                text = caption.read_text(encoding="utf-8-sig").strip() if caption.is_file() else ""
            except (OSError, UnicodeDecodeError):
                text = ""
            text = text or self.caption
            if text:
                good.append(Captioned(str(image.relative_to(folder)), text, origin=origin))
            else:
                bad.append(BadRow(origin, f"its caption {caption.name} is missing, empty or not UTF-8"))
        if not good and not bad:
            raise UserError("data.folder_images.path", self.path, f"the folder holds no images ({', '.join(IMAGES)})")
        return Rows(tuple(good), "captioned", ("image", "text"), tuple(bad))


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())


def holds_images(path: str) -> bool:
    """Is this a folder of images? What `temper data` asks before it reads rows."""
    folder = Path(path).expanduser()
    return folder.is_dir() and any(_images(folder))


def as_read(rows: Rows, tokenizer) -> list[Encoded]:
    """The captions as a text encoder reads them. No token carries loss: the images do."""
    from PIL import Image

    said = []
    for example in rows:
        with Image.open(example.image) as image:
            name = f"{Path(example.image).name} ({image.width} x {image.height})"
        ids = tokenizer(example.text)["input_ids"]
        origin = Origin(name, example.origin.line, example.origin.unit)
        said.append(Encoded(ids, [0.0] * len(ids), ((0, len(ids), "caption"),), origin))
    return said
