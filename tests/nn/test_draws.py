import math
import secrets

import pytest
import torch
from scipy import stats

from temperament.nn import draws

SEED = secrets.randbits(40)


def ids(n):
    return torch.randint(0, 1 << 40, (n,))


def test_equal_addresses_draw_equal_bits_whatever_stands_beside_them():
    examples, positions = ids(50), torch.randint(0, 4096, (50,))
    whole = draws.uniform(SEED, "sample", 3, examples, positions)
    order = torch.randperm(50)
    assert torch.equal(whole[order], draws.uniform(SEED, "sample", 3, examples[order], positions[order]))
    alone = torch.stack([draws.uniform(SEED, "sample", 3, e, int(p)) for e, p in zip(examples, positions, strict=True)])
    assert torch.equal(whole, alone)
    block = draws.normal(SEED, "noise", 0, examples, (3, 4, 5))
    assert block.shape == (50, 3, 4, 5)
    assert torch.equal(block[7:9], draws.normal(SEED, "noise", 0, examples[7:9], (3, 4, 5)))
    flat = draws.normal(SEED, "noise", 0, examples[:, None], torch.arange(60))
    assert torch.equal(block.flatten(1), flat)


def test_python_and_tensor_words_agree():
    e, p = secrets.randbits(30), secrets.randbits(20)
    golden, word = 0x9E3779B97F4A7C15, (1 << 64) - 1
    by_hand = draws._mix_int(draws._mix_int(draws.key(SEED, "x", 5) + golden * (e + 1)) + golden * (p + 1))
    assert int(draws.words(SEED, "x", 5, torch.tensor(e), p)) & word == by_hand


def test_words_do_not_change_between_versions_and_processes():
    assert int(draws.words(7, "sample", 2, torch.tensor(11), 5)) == 5767657922432220583
    assert draws.permutation(8, 7, "order", 1).tolist() == [7, 0, 5, 6, 4, 3, 1, 2]


@pytest.mark.parametrize("change", ["seed", "purpose", "step", "example", "position"])
def test_any_change_of_address_gives_unrelated_draws(change):
    base = dict(seed=SEED, purpose="a", step=1, examples=torch.arange(20000), positions=3)
    other = dict(base)
    key = {"example": "examples", "position": "positions"}.get(change, change)
    other[key] = "b" if change == "purpose" else base[key] + (20000 if change == "example" else 1)
    x, y = draws.uniform(**base), draws.uniform(**other)
    assert abs(stats.pearsonr(x, y).statistic) < 5 / math.sqrt(20000)
    table = torch.histogramdd(torch.stack([x, y], 1), bins=[8, 8], range=[0.0, 1.0, 0.0, 1.0]).hist
    assert stats.chisquare(table.flatten()).pvalue > 1e-6


def test_avalanche():
    examples, positions = ids(4000), torch.randint(0, 1 << 20, (4000,))
    base = draws.words(SEED, "a", 0, examples, positions)
    for bit in (0, 1, 7, 19, 33):
        for e, p in ((examples ^ (1 << bit), positions), (examples, positions ^ (1 << bit))):
            changed = base ^ draws.words(SEED, "a", 0, e, p)
            share = torch.stack([((changed >> b) & 1).float().mean() for b in range(64)])
            assert (share - 0.5).abs().max() < 6 * 0.5 / math.sqrt(4000)


def test_distributions():
    consecutive = torch.arange(300)[:, None], torch.arange(200)
    u = draws.uniform(SEED, "u", 0, *consecutive)
    assert u.min() >= 0 and u.max() < 1 and u.dtype == torch.float32
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-6
    n = draws.normal(SEED, "n", 0, *consecutive)
    assert stats.kstest(n.flatten().numpy(), "norm").pvalue > 1e-6
    for axis in (0, 1):  # neighbours along either axis of the address are uncorrelated
        a, b = n.narrow(axis, 0, n.shape[axis] - 1), n.narrow(axis, 1, n.shape[axis] - 1)
        assert abs(stats.pearsonr(a.flatten(), b.flatten()).statistic) < 6 / math.sqrt(a.numel())
    k = draws.randint(7, SEED, "k", 0, *consecutive)
    assert stats.chisquare(torch.bincount(k.flatten(), minlength=7)).pvalue > 1e-6


def test_permutation_is_one_and_changes_by_epoch():
    p, q = draws.permutation(1000, SEED, "order", 0), draws.permutation(1000, SEED, "order", 1)
    assert torch.equal(p.sort().values, torch.arange(1000)) and torch.equal(q.sort().values, torch.arange(1000))
    assert abs(stats.spearmanr(p, q).statistic) < 0.2 and abs(stats.spearmanr(p, range(1000)).statistic) < 0.2
    places = torch.stack([draws.permutation(5, SEED, "order", e) for e in range(3000)])
    assert stats.chisquare(torch.stack([torch.bincount(c, minlength=5) for c in places.T]).flatten()).pvalue > 1e-6


def test_dropout_is_addressed_by_token_so_packing_does_not_move_it():
    examples = torch.tensor([[4, 4, 4, 9, 9], [6, 6, 6, 6, 6]])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    x = torch.randn(2, 5, 64)
    packed = draws.dropout(x, 0.3, draws.Address(SEED, "dropout", 1, examples, positions))
    alone = draws.dropout(x[:1, 3:], 0.3, draws.Address(SEED, "dropout", 1, torch.tensor([[9, 9]]), torch.tensor([[0, 1]])))
    assert torch.equal(packed[:1, 3:], alone)
    big = draws.dropout(torch.ones(8, 4000), 0.3, draws.Address(SEED, "dropout", 1, torch.arange(8)))
    assert abs((big == 0).float().mean() - 0.3) < 6 * math.sqrt(0.21 / 32000)
    assert torch.allclose(big[big > 0], torch.tensor(1 / 0.7))
    assert draws.dropout(x, 0.3, None) is x and draws.dropout(x, 0.0, draws.Address(0, "d", 0, torch.arange(2))) is x
    a = draws.Address(SEED, "dropout", 1, torch.arange(2))
    assert not torch.equal(a.uniform((9,)), a.at("layer.0").uniform((9,)))


def test_generator_is_addressed():
    draw = lambda *a: torch.rand(4, generator=draws.generator(*a))
    assert torch.equal(draw(SEED, "g", 1, 2), draw(SEED, "g", 1, 2))
    assert not torch.equal(draw(SEED, "g", 1, 2), draw(SEED, "g", 2, 1))
