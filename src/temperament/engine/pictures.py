"""Pictures: from files or worlds into batches, from batches into models and reports.

    rows = [Picture(image, label=3, caption="a red cross on navy"), ...]
    stream = Stream(rows, ctx)                  a source's stream: epochs in an order of the seed's, `Images` of the base's size
    normalised(base, pixels)                    as the base's image processor would hand them over
    png(pixels)                                 one picture as a data: address, for a report

In a batch pixels are in 0..1, whoever made them and whatever reads them: only the call of a model knows how that model
wants them. A picture of another size than the base's is resized on its shorter side and cut in the middle."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.batch import Images


@dataclass(frozen=True)
class Picture:
    """image: (3, H, W) float32 in 0..1 or eight bits, or the path of a file. label: its class in the source's numbering, -1 for
    none. alternatives: what could be said of it, one caption a class: what a model of pictures and words chooses among."""

    image: Any
    caption: str = ""
    label: int = -1
    id: str = ""
    prior: bool = False  # made by the base itself
    alternatives: tuple[str, ...] = ()

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """(3, H, W) in 0..1, of this size."""
        if isinstance(self.image, str):
            return _opened(self.image, size)
        pixels = torch.as_tensor(np.ascontiguousarray(self.image))
        pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels.float()
        return pixels if tuple(pixels.shape[1:]) == size else _fitted(pixels, size)


def _opened(path: str, size: tuple[int, int]) -> Tensor:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        fitted = ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32).transpose(2, 0, 1).copy()) / 255


def _fitted(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = pixels.shape[1:]
    scale = max(size[0] / height, size[1] / width)
    large = (max(round(height * scale), size[0]), max(round(width * scale), size[1]))
    pixels = torch.nn.functional.interpolate(pixels[None], large, mode="bilinear", antialias=True)[0]
    top, left = (large[0] - size[0]) // 2, (large[1] - size[1]) // 2
    return pixels[:, top : top + size[0], left : left + size[1]].clamp(0, 1)


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(rows, 3, H, W) of this size, with their gradient; none is cut off."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)


def size_of(base: Any) -> tuple[int, int]:
    """(H, W) of the pictures a base takes or makes. Raises UserError where it takes none."""
    scale = 1
    if (codec := base.components.get("codec")) is not None:
        scale = 2 ** (len(codec.config.block_out_channels) - 1)
    for module in base.components.values():
        config = getattr(module, "config", None)
        config = getattr(config, "vision_config", config)
        side = getattr(config, "image_size", None) or getattr(config, "sample_size", None)
        if side is not None:
            height, width = side if isinstance(side, (list, tuple)) else (side, side)
            return scale * height, scale * width
    processor = base.processors.get("image")
    size = dict(getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {})
    if side := size.get("height") or size.get("shortest_edge"):
        return side, size.get("width") or side
    raise UserError("base", base.id, "it takes no pictures; use an image base, e.g. lab/vit, lab/clip or lab/unet")


def normalised(base: Any, pixels: Tensor) -> Tensor:
    """Pixels as the base's networks were trained to see them: by its processor's mean and spread, or -1..1."""
    processor = base.processors.get("image")
    mean, std = getattr(processor, "image_mean", None) or 0.5, getattr(processor, "image_std", None) or 0.5
    shaped = lambda v: torch.as_tensor(v, dtype=pixels.dtype, device=pixels.device).reshape(-1, 1, 1)
    return (pixels - shaped(mean)) / shaped(std)


class Stream:
    """Batches of pictures, every epoch in an order of its own. The whole batch, the same on every process."""

    def __init__(self, pictures: Sequence[Picture], ctx: Any, purpose: str = "pictures"):
        if not pictures:
            raise UserError("train.source", purpose, "it holds no picture")
        self.pictures, self.ctx, self.purpose = list(pictures), ctx, purpose
        self.size = size_of(ctx.base)
        self.steps_per_epoch = -(-len(self.pictures) // ctx.batch)

    def batch(self, step: int, progress: Any = None) -> Images:
        """Rows go on where the last step ended, over the end of an epoch: every batch is full."""
        n, k = len(self.pictures), self.ctx.batch
        places = torch.arange(step * k, step * k + k)
        orders = {e: draws.permutation(n, self.ctx.seed, self.purpose, e) for e in set((places // n).tolist())}
        return images([(int(p), self.pictures[int(orders[int(p) // n][int(p) % n])]) for p in places], self.size)

    def largest(self) -> Images:
        return self.batch(0)


def images(rows: Sequence[tuple[int, Picture]], size: tuple[int, int]) -> Images:
    """(id, picture) of each row -> a batch. The id is that of the *visit*, so a picture seen twice meets other noise."""
    some = [p for _, p in rows]
    return Images(
        torch.stack([p.pixels(size) for p in some]),
        torch.tensor([i for i, _ in rows]),
        torch.tensor([p.label for p in some]),
        [p.caption for p in some],
        torch.tensor([p.prior for p in some]),
    )


def thumbnail(pixels: Tensor, side: int = 96) -> Tensor:
    """No larger than a report has room for."""
    height, width = pixels.shape[1:]
    small = side / max(height, width)
    return pixels if small >= 1 else _fitted(pixels, (max(round(height * small), 1), max(round(width * small), 1)))


def shown(pixels: Tensor, least: int = 64, most: int = 256) -> Tensor:
    """A picture of a size to look at: small ones enlarged by whole pixels, large ones reduced."""
    pixels = thumbnail(pixels, most)
    times = max(-(-least // max(pixels.shape[-2:])), 1)
    return pixels.repeat_interleave(times, -2).repeat_interleave(times, -1)


def sheet(pixels: Tensor, gap: int = 6) -> Tensor:
    """Pictures (rows, columns, 3, H, W) as one, with light gaps between."""
    rows = []
    for row in pixels:
        cells = torch.stack([shown(p) for p in row])
        cells = torch.nn.functional.pad(cells, (gap, 0, gap, 0), value=0.93)
        rows.append(torch.cat(list(cells), -1))
    return torch.nn.functional.pad(torch.cat(rows, -2), (0, gap, 0, gap), value=0.93)


def png(pixels: Tensor, side: int = 192) -> str:
    """(3, H, W) in 0..1 -> data:image/png;base64,... without any library: eight bits, three channels; large ones reduced."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(thumbnail(pixels, side))).decode()}"


def png_bytes(pixels: Tensor) -> bytes:
    rows = (pixels.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    height, width, _ = rows.shape
    out = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    out.seek(0, io.SEEK_END)
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows), 9)),
        (b"IEND", b""),
    ):
        out.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return out.getvalue()
