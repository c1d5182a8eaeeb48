"""Particles: a chain small enough to enumerate, lineages whose potentials telescope, and the rules of odd weights."""

import itertools

import pytest
import torch

from temperament.engine.particles import Particles, Potential, moments
from temperament.nn import draws

SEED = int(torch.seed() % 10**6)
G = torch.Generator().manual_seed(SEED)
STEPS = 3


class Chain:
    """Two states, three steps: the first drawn from `begin`, each next from `step`; a reward of the whole way."""

    def __init__(self):
        self.begin, self.step = torch.rand(2, generator=G) + 0.2, torch.rand(2, 2, generator=G) + 0.2
        self.begin, self.step = self.begin / self.begin.sum(), self.step / self.step.sum(-1, keepdim=True)
        self.promise = torch.rand(STEPS, 2, generator=G)  # what a draft is thought worth at each step
        self.reward = torch.rand(2, 2, 2, generator=G)

    def target(self, strength):
        p = torch.zeros(2, 2, 2, dtype=torch.float64)
        for way in itertools.product((0, 1), repeat=STEPS):
            p[way] = self.begin[way[0]] * self.step[way[0], way[1]] * self.step[way[1], way[2]]
        p = p * torch.exp(strength * self.reward.double())
        return p / p.sum()

    def run(self, potential, ess, n, seed=SEED):
        crowd, ids, way = Particles(potential, 1, n, ess), torch.arange(n), torch.zeros(n, 0, dtype=torch.long)
        history = torch.zeros(n, 0, dtype=torch.float64)  # the promises of each lineage
        for i in range(STEPS):
            p = self.begin.expand(n, 2) if i == 0 else self.step[way[:, -1]]
            new = (draws.uniform(seed, "chain/step", i, ids) >= p[:, 0]).long()
            way = torch.cat([way, new[:, None]], 1)
            seen = self.promise[i][new].double()
            history = torch.cat([history, seen[:, None]], 1)
            rows = crowd.weigh(seen[None], draws.uniform(seed, "chain/resample", i, ids)[None])
            if rows is not None:
                way, history = way[rows], history[rows]
        final = self.reward[way[:, 0], way[:, 1], way[:, 2]].double()
        before = crowd.given.clone()
        crowd.finish(final[None])
        return crowd, way, history, final, before


@pytest.mark.parametrize("ess", [None, 0.5])
@pytest.mark.parametrize("kind", ["diff", "max", "sum"])
def test_weighted_at_the_end_drafts_are_draws_of_the_target(kind, ess):
    chain, strength, n = Chain(), 1.5, 40_000
    crowd, way, *_ = chain.run(Potential(kind, strength), ess, n)
    share = torch.zeros(2, 2, 2, dtype=torch.float64)
    share.index_put_(tuple(way.T), crowd.share()[0], accumulate=True)
    assert float((share - chain.target(strength)).abs().max()) < 0.015
    u = (torch.arange(n) + 0.5) / n
    found = torch.stack([way[crowd.drawn(u[i : i + 1])[0]] for i in range(0, n, 400)])  # a draw follows the weights
    first = float((found[:, 0] == 0).double().mean())
    assert abs(first - float(chain.target(strength)[0].sum())) < 0.2


@pytest.mark.parametrize("kind", ["diff", "max", "sum"])
def test_without_strength_nothing_is_changed(kind):
    chain, n = Chain(), 40_000
    crowd, way, *_ = chain.run(Potential(kind, 0.0), None, n)
    assert torch.allclose(crowd.share(), torch.full((1, n), 1 / n, dtype=torch.float64))
    share = torch.bincount(way[:, 0] * 4 + way[:, 1] * 2 + way[:, 2], minlength=8).view(2, 2, 2) / n
    assert float((share - chain.target(0.0)).abs().max()) < 0.02


@pytest.mark.parametrize("ess", [None, 0.7])
def test_the_potentials_of_a_lineage_multiply_to_its_reward(ess):
    """diff telescopes of itself; the others by their last potential; and what a lineage was given is what its way says."""
    strength, start = float(2 * torch.rand((), generator=G)), -0.3
    for kind in ("diff", "max", "sum"):
        crowd, _, history, final, before = Chain().run(Potential(kind, strength, start), ess, 500)
        seen = {"diff": history - torch.cat([torch.full((500, 1), start), history[:, :-1]], 1),
                "max": history.cummax(1).values.clamp(min=start), "sum": history.cumsum(1) + start}[kind]  # fmt: skip
        torch.testing.assert_close(before[0], strength * seen.sum(1))
        torch.testing.assert_close(crowd.given[0], strength * (final - start))


def test_weights_between_resamplings_multiply():
    """With ess so low that nothing is resampled, the weights are those of the whole way."""
    crowd = Particles(Potential("diff", 1.3), 3, 5, ess=1e-9)
    rewards = torch.rand(4, 3, 5, generator=G, dtype=torch.float64)
    for i, r in enumerate(rewards[:3]):
        assert crowd.weigh(r, torch.rand(3, 5, generator=G)) is None, i
    torch.testing.assert_close(crowd.weight, 1.3 * rewards[2])
    crowd.finish(rewards[3])
    torch.testing.assert_close(crowd.share(), torch.softmax(1.3 * rewards[3], -1))
    assert (crowd.best() == rewards[3].argmax(1) + 5 * torch.arange(3)).all()


def test_odd_rewards():
    nan, inf = float("nan"), float("inf")
    crowd = Particles(Potential("max", 1.0), 3, 2)
    rows = crowd.weigh(torch.tensor([[nan, 0.1], [nan, nan], [-inf, 0.0]]), torch.rand(3, 2, generator=G))
    assert rows[:2].tolist() == [1, 1] and rows[4:].tolist() == [5, 5]  # what has no reward is given up
    assert set(rows[2:4].tolist()) <= {2, 3}  # where none has, none is preferred
    crowd.finish(torch.tensor([[nan, 2.0], [nan, nan], [1.0, 3.0]]))
    assert crowd.best().tolist() == [1, 2, 5] and crowd.share().isfinite().all()
    big = Particles(Potential("sum", 1e6), 1, 3)
    big.weigh(torch.tensor([[1e6, 0.0, -1e6]]), torch.rand(1, 3, generator=G))
    assert big.weight.isfinite().all()


def test_one_group_does_not_know_another():
    rewards, u = torch.rand(3, 4, generator=G), torch.rand(3, 4, generator=G)
    whole = Particles(Potential(), 3, 4).weigh(rewards, u)
    for g in range(3):
        assert (Particles(Potential(), 1, 4).weigh(rewards[g : g + 1], u[g : g + 1]) + 4 * g).equal(whole[4 * g : 4 * g + 4])


def test_moments():
    assert moments(4, 0.2, 0.8, 100) == [20, 40, 60, 80] and moments(0, 0.2, 0.8, 100) == []
    assert moments(1, 0.2, 0.8, 10) == [5] and moments(9, 0.0, 1.0, 3) == [0, 1, 2]
