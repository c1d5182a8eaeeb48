"""What a step's source noted while the step learnt, for what measures the step afterwards.

    keep(folder, key, {"said": (n, classes), ...})      the step's scratch folder and address; replaced at once, whole
    kept(folder, key)                                   the same tensors, or None: nothing was noted, or of another step

The key is in the file, so a note of a step that has since been changed is never taken for this one's."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

NAME, SCRATCH = "record.safetensors", "scratch"


def keep(scratch: Path, key: str, tensors: dict[str, Tensor]) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    part = scratch / f"{NAME}.part"
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, part, {"key": key})
    os.replace(part, scratch / NAME)


def kept(scratch: Path, key: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(scratch / NAME, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
