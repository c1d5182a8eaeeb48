"""How far apart two sets of features are: the squared maximum mean discrepancy, unbiased.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    polynomial    k(u, v) = (<u, v> / d + 1)^degree, d their width       (KID: degree 3)
    linear        k(u, v) = <u, v>:  |mean x - mean y|^2 - tr cov(x) / m - tr cov(y) / n
    rbf           k(u, v) = exp(-|u - v|^2 / (2 d))

Its expectation is 0 where both sets are of one distribution, so it may be below. Sources: Gretton et al. 2012; Binkowski et al.
2018 (KID); Aiello et al. 2024 (paper 054)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["polynomial", "linear", "rbf"]


def gram(x: Tensor, y: Tensor, kernel: Kernel = "polynomial", degree: int = 3) -> Tensor:
    """x (m, d), y (n, d) -> (m, n), fp64."""
    x, y = x.double(), y.double()
    if kernel == "rbf":
        far = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
        return torch.exp(-far / (2 * x.shape[1]))
    return x @ y.T if kernel == "linear" else (x @ y.T / x.shape[1] + 1) ** degree


def mmd(x: Tensor, y: Tensor, kernel: Kernel = "polynomial", degree: int = 3) -> Tensor:
    """x (m, d), y (n, d), at least two of each -> ()."""
    one = torch.ones(len(x), dtype=torch.float64, device=x.device)
    return weighted(gram(x, x, kernel, degree), gram(y, y, kernel, degree), gram(x, y, kernel, degree), one)


def weighted(xx: Tensor, yy: Tensor, xy: Tensor, times: Tensor) -> Tensor:
    """The same of a set in which x_i occurs `times` (m,) - a resample; one x beside itself is no pair."""
    pairs = times[:, None] * times[None]
    pairs = pairs - torch.diag(pairs.diagonal())
    n = len(yy)
    own = (xx * pairs).sum() / pairs.sum()
    theirs = (yy.sum() - yy.diagonal().sum()) / (n * (n - 1))
    return own + theirs - 2 * (times[:, None] * xy).sum() / (times.sum() * n)
