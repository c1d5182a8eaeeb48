"""What a base says of the pictures it takes: `preprocessor_config.json`, read plainly.

Nothing is wanted of an image processor but its size, mean and spread; so it is no class of transformers', which would need
Pillow and torchvision and warn of them, and no code of the folder's is ever near. It travels with what is exported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temperament.errors import UserError

NAME = "preprocessor_config.json"


@dataclass(frozen=True)
class ImageSettings:
    told: dict[str, Any]

    @property
    def image_mean(self) -> Any:
        return self._channels("image_mean", 0.0)

    @property
    def image_std(self) -> Any:
        return self._channels("image_std", 1.0)

    def _channels(self, name: str, none: float) -> Any:
        """Where it says nothing, 0.5, which brings pixels to -1..1; `none` where it does not normalise."""
        return none if self.told.get("do_normalize") is False else self.told.get(name) or 0.5

    @property
    def size(self) -> dict[str, int]:
        return self._size("size")

    @property
    def crop_size(self) -> dict[str, int]:
        return self._size("crop_size") if self.told.get("do_center_crop") else {}

    def _size(self, name: str) -> dict[str, int]:
        said = self.told.get(name) or {}
        return {"height": said, "width": said} if isinstance(said, int) else dict(said)

    def save_pretrained(self, folder: str | Path) -> None:
        (Path(folder) / NAME).write_text(json.dumps(self.told, indent=1) + "\n", encoding="utf-8")


def image_settings(source: str, folder: Path | None, field: str = "base") -> ImageSettings | None:
    """Those of a folder, or of what a hub has handed out; None where it speaks of no pictures. Raises UserError where the
    file is damaged."""
    file = folder / NAME if folder is not None else _fetched(source)
    if file is None or not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        settings = ImageSettings(told)
        numbers = [settings.image_mean, settings.image_std, *settings.size.values(), *settings.crop_size.values()]
        flat = [x for n in numbers if n is not None for x in (n if isinstance(n, list) else [n])]
        if not all(isinstance(x, (int, float)) for x in flat):
            raise ValueError("its sizes, mean and spread must be numbers")
        return settings
    except (ValueError, TypeError, AttributeError, OSError) as problem:
        why = " ".join(str(problem).split())[:120]
        raise UserError(field, source, f"its {NAME} could not be read ({why}); copy it again") from None


def _fetched(source: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        found = cached_file(source, NAME, **quiet)
    except OSError:
        return None
    return Path(found) if found else None
