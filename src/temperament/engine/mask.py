"""Masks of light on pictures: a coarse grid of numbers in 0..1, made as large as the picture, blurred, multiplied with it.

    masked(pixels, cells, kernel=13, sigma=6.0)     pixels (rows, 3, H, W), cells (rows, g * g) -> pixels * mask
    log_beta(cells, a, b)                           how likely each cell is under Beta(a, b), nats
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked(pixels: Tensor, cells: Tensor, kernel: int, sigma: float) -> Tensor:
    side = round(cells.shape[1] ** 0.5)
    mask = F.interpolate(cells.to(pixels).view(-1, 1, side, side), pixels.shape[-2:], mode="nearest")
    return pixels * blurred(mask, kernel, sigma)


def blurred(x: Tensor, kernel: int, sigma: float) -> Tensor:
    """Gaussian of `kernel` pixels (odd), the border mirrored; sigma 0 or one pixel: x itself."""
    if sigma == 0 or kernel == 1:
        return x
    half = kernel // 2
    weights = torch.exp(-(torch.arange(-half, half + 1, device=x.device) ** 2) / (2 * sigma**2)).to(x)
    weights = (weights / weights.sum()).view(1, 1, -1)
    for across in (False, True):
        pad = (half, half, 0, 0) if across else (0, 0, half, half)
        kind = "reflect" if half < x.shape[-1 if across else -2] else "replicate"
        shape = (1, 1, 1, kernel) if across else (1, 1, kernel, 1)
        x = F.conv2d(F.pad(x, pad, mode=kind), weights.view(shape))
    return x


def log_beta(m: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(a - 1) log m + (b - 1) log (1 - m) - log B(a, b), cell by cell."""
    return (a - 1) * m.log() + (b - 1) * torch.log1p(-m) - (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b))
