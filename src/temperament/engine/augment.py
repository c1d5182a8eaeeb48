"""Another look at a picture: shifted, turned and scaled a little, in other light and colours, with some noise.

    looked(pixels, examples, seed, "one")           (rows, 3, H, W) -> the same, in 0..1
    looked(pixels, examples, seed, "two", 0.5)      a second look, half as far from the picture

What a row's look is depends on (seed, name of the look, the row's example id) and nothing else: not on its batch, the process
or the order of calls. Rows are made one by one, so a look has the same bits in any batch. Left stays left: pictures are never
mirrored, as captions may name sides."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from temperament.nn import draws

# The most at strength 1: shift in shares of a side, turn in degrees, zoom as a factor less 1, light, contrast and colour as
# factors less 1, noise as a spread in 0..1.
SHIFT, TURN, ZOOM, LIGHT, CONTRAST, COLOUR, NOISE = 0.06, 12.0, 0.1, 0.3, 0.3, 0.3, 0.05
GREY = (0.299, 0.587, 0.114)


def looked(pixels: Tensor, examples: Tensor, seed: int, look: str, strength: float = 1.0) -> Tensor:
    """pixels (rows, 3, H, W) in 0..1; strength 0 is the picture itself."""
    if strength == 0:
        return pixels
    # Drawn where the examples are and moved: the bits are then the same on every device.
    u = strength * (2 * draws.uniform(seed, f"look/{look}", 0, examples, (8,)).to(pixels) - 1)  # (rows, 8) in -1..1
    x = _moved(pixels, u[:, 0] * SHIFT, u[:, 1] * SHIFT, u[:, 2] * math.radians(TURN), 1 + u[:, 3] * ZOOM)
    light, contrast, colour = ((1 + u[:, k] * most).view(-1, 1, 1, 1) for k, most in ((4, LIGHT), (5, CONTRAST), (6, COLOUR)))
    x = x * light
    x = x.mean((1, 2, 3), keepdim=True) * (1 - contrast) + x * contrast
    grey = (x * x.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    x = grey * (1 - colour) + x * colour
    noise = draws.normal(seed, f"look/{look}/noise", 0, examples, tuple(pixels.shape[1:])).to(pixels)
    return (x + u[:, 7].abs().view(-1, 1, 1, 1) * NOISE * noise).clamp(0, 1)


def _moved(x: Tensor, down: Tensor, right: Tensor, turn: Tensor, zoom: Tensor) -> Tensor:
    """Bilinear; what comes in from outside is the border."""
    cos, sin = turn.cos() / zoom, turn.sin() / zoom
    back = torch.stack([torch.stack([cos, -sin, 2 * right], 1), torch.stack([sin, cos, 2 * down], 1)], 1)
    grid = F.affine_grid(back, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
