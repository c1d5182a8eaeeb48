"""Low rank: exact where the expression is, else the best approximation."""

import pytest
import torch

from temperament.delta import Delta, Dense, LowRank, Masked, Replace, Rows, Sum
from temperament.delta.lowrank import as_low_rank, to_low_rank, truncated
from temperament.errors import UserError


def lora(out=8, width=10, rank=2, scale=0.5, layout="linear"):
    return LowRank(torch.randn(rank, width), torch.randn(out, rank), layout, scale=scale)


EXACT = {
    "itself": lambda: lora(),
    "sum": lambda: Sum((lora(), lora(scale=-2.0, rank=3), lora(scale=0))).scaled(0.3),
    "sum with nothing first": lambda: Sum((lora(scale=0), lora())),
    "conv1d sum": lambda: Sum((lora(layout="conv1d"), lora(layout="conv1d", scale=2.0))),
    "rows": lambda: Rows(lora(out=3), torch.tensor([5, 0, 2]), (8, 10), scale=0.7),
    "row mask": lambda: Masked(lora(), torch.randn(8, 1) > 0),
    "soft row mask": lambda: Masked(Sum((lora(), lora())), torch.rand(8, 1), scale=-1.0),
    "one number": lambda: Masked(lora(), torch.rand(1, 1)),
}
OTHER = {
    "dense": lambda: Dense(torch.randn(8, 10)),
    "column mask": lambda: Masked(lora(), torch.randn(1, 10) > 0),
    "entries": lambda: Masked(lora(), torch.randn(8, 10) > 0),
    "mixed sum": lambda: Sum((lora(), Dense(torch.randn(8, 10)))),
    "mixed layouts": lambda: Sum((lora(8, 8), lora(8, 8, layout="conv1d"))),
}


@pytest.mark.parametrize("name", sorted(EXACT))
def test_exact(name):
    change = EXACT[name]()
    torch.testing.assert_close(as_low_rank(change).delta(), change.delta())


@pytest.mark.parametrize("name", sorted(OTHER))
def test_what_is_not(name):
    assert as_low_rank(OTHER[name]()) is None


@pytest.mark.parametrize("shape", [(8, 10), (10, 8), (6, 4, 3, 3)])
def test_truncated_is_optimal(shape):
    d = torch.randn(shape)
    S = torch.linalg.svdvals(d.flatten(1))
    for rank in (1, 3, 6):
        change = truncated(d, rank=rank)
        assert change.rank == rank and change.weight_shape == shape
        torch.testing.assert_close((d - change.delta()).norm(), S[rank:].norm(), rtol=1e-4, atol=1e-5)
    for error in (0.9, 0.4, 0.05):
        change = truncated(d, error=error)
        left = lambda rank: S[rank:].norm() / S.norm()
        assert left(change.rank) <= error and (change.rank == 1 or left(change.rank - 1) > error)
    assert truncated(torch.zeros(4, 5), error=0.1).delta().norm() == 0


def test_a_whole_delta():
    kept, W = lora(), torch.randn(8, 10)
    changes = {"lm/a.weight": kept, "lm/b.weight": Replace(torch.randn(8, 10)), "lm/n.weight": Dense(torch.randn(8))}
    delta = Delta(changes, strength=0.5)
    small = to_low_rank(delta, rank=4, base={"lm/b.weight": W})
    assert small.strength == 1 and small.names == delta.names
    assert torch.equal(small.change("lm/a.weight").A, kept.A) and small.change("lm/b.weight").rank == 4
    torch.testing.assert_close(small.change("lm/a.weight").delta(), 0.5 * kept.delta())
    torch.testing.assert_close(small.change("lm/n.weight").delta(), delta.change("lm/n.weight").delta())
    full = to_low_rank(delta, rank=8, base={"lm/b.weight": W})
    torch.testing.assert_close(full.change("lm/b.weight").delta(), delta.change("lm/b.weight").delta(W), rtol=1e-4, atol=1e-5)
    for wrong in ({}, {"rank": 1, "error": 0.1}, {"rank": 0}, {"error": 2.0}):
        with pytest.raises(UserError):
            to_low_rank(delta, **wrong)
