"""Statistics of batch norms, measured anew: what merged weights need, as their units vary less than those they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def counted(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """The batch norms that keep statistics."""
    return [m for module in modules for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def counting_anew(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Inside, every forward counts as much as any other; afterwards the norms hold the mean over them and use it."""
    kept = [(m, m.momentum) for m in norms]
    try:
        for m, _ in kept:
            m.reset_running_stats()
            m.momentum = None
            m.train()
        yield
    finally:
        for m, momentum in kept:
            m.momentum = momentum
            m.eval()
