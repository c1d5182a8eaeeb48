"""Exact selection over blocks: the k-th largest of any number of values, in two passes and a few hundred kilobytes.

The bits of a float that is not negative, read as an integer, are in its order. A first pass counts values by their upper 15
bits, a second those of the one bin that holds the k-th by their lower 16: the value itself, not an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from temperament.delta.merging import Block, Gather, Site, Total

UPPER, LOWER = 1 << 15, 1 << 16


def magnitudes(b: Block) -> list[Tensor]:
    return [v.float().abs() for v in b.x]


def kth_largest(
    spans: int, size: int, counts: Sequence[int], of: Callable[[Block], list[Tensor]] = magnitudes
) -> Generator[Gather | Total, object, list[float]]:
    """For each list of values (fp32, none negative) its counts[i]-th largest; inf for a count of 0, 0 for one of all.

    spans: how many blocks there are; size: of how many values. `keep = value >= threshold` keeps counts[i] values, and those
    that are equal to the last of them.
    """
    asked = [0 < k < size for k in counts]
    if not any(asked):
        return [np.inf if k <= 0 else 0.0 for k in counts]
    if spans == 1:

        def direct(b: Block) -> list[float]:
            each = zip(of(b), counts, asked, strict=True)
            return [float(np.partition(v.numpy(), size - k)[size - k]) if a else 0.0 for v, k, a in each]

        (found,) = yield Gather(direct)
        return [v if a else (np.inf if k <= 0 else 0.0) for v, k, a in zip(found, counts, asked, strict=True)]

    def upper(b: Block) -> list[np.ndarray]:
        each = [v.view(torch.int32).bitwise_right_shift(16) if a else None for v, a in zip(of(b), asked, strict=True)]
        return [np.zeros(1, np.int64) if v is None else torch.bincount(v, minlength=UPPER).numpy() for v in each]

    bins, left = [], []
    for counted, k, a in zip((yield Total(upper)), counts, asked, strict=True):
        at, rest = _from_top(counted, k) if a else (0, 0)
        bins.append(at)
        left.append(rest)

    def lower(b: Block) -> list[np.ndarray]:
        found = []
        for v, at, a in zip(of(b), bins, asked, strict=True):
            if not a:
                found.append(np.zeros(1, np.int64))
                continue
            bits = v.view(torch.int32).numpy()
            low, high = at << 16, (at << 16) | 0xFFFF
            inside = bits[(bits >= low) & (bits <= high)] if at else bits[bits <= high]
            found.append(np.bincount(inside & 0xFFFF, minlength=LOWER))
        return found

    totals = yield Total(lower)
    out = []
    for counted, at, rest, k, a in zip(totals, bins, left, counts, asked, strict=True):
        bits = (at << 16) | _from_top(counted, rest)[0] if a else 0
        out.append(float(np.array(bits, np.int32).view(np.float32)) if a else (np.inf if k <= 0 else 0.0))
    return out


def _from_top(counted: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th value counted from the top, and its rank inside."""
    above = counted[::-1].cumsum()
    at = int(np.searchsorted(above, k))
    return len(counted) - 1 - at, k - (int(above[at - 1]) if at else 0)


def largest(site: Site, counts: Sequence[int], of: Callable[[Block], list[Tensor]] = magnitudes):
    """kth_largest within one site."""
    return kth_largest(len(site.spans()), site.numel, counts, of)


def keep_from(v: Tensor, threshold: float) -> Tensor:
    """v with every |value| below the threshold 0, in place."""
    if threshold <= 0:
        return v
    if threshold == np.inf:
        return v.zero_()
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))
    return torch.hardshrink(v, below, out=v)
