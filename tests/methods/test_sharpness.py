"""Sharpness by its closed forms; interpolation: ends, chords, and the layer that breaks the line is found."""

from types import SimpleNamespace

import pytest
import torch
from tiny import rng, tiny, tokens
from torch import nn

from temperament import parts
from temperament.delta import Delta, Dense
from temperament.errors import UserError
from temperament.methods.diagnose._path import Path, loss_of
from temperament.methods.diagnose.interpolation import barrier
from temperament.methods.diagnose.sharpness import average, worst


def quadratic(n=6):
    A = torch.randn(n, n, generator=rng(), dtype=torch.float64)
    w = torch.randn(n, generator=rng(), dtype=torch.float64)
    return A @ A.T, w


def test_average_of_a_quadratic():
    """0.5 rho^2 tr(H diag(w^2)), in expectation; the pairs cancel what is linear."""
    H, w = quadratic()
    t, rho = w.clone(), 0.1
    got = average(lambda: 0.5 * t @ H @ t, {"w": t}, rho, 4000)
    want = 0.5 * rho**2 * float((H.diagonal() * w.square()).sum())
    assert got == pytest.approx(want, rel=0.12) and torch.equal(t, w)


def test_worst_of_a_quadratic_at_its_optimum_is_the_top_eigenvalue():
    """L = 0.5 (w - w0)^T H (w - w0) at w0 with |w0| = 1 entrywise: 0.5 rho^2 lambda_max in the 2-norm."""
    H, _ = quadratic()
    w0 = torch.sign(torch.randn(6, generator=rng(), dtype=torch.float64))
    t = w0 + 1e-6 * torch.randn(6, generator=rng(), dtype=torch.float64)  # at the optimum itself there is no direction
    got = worst(lambda: 0.5 * (t - w0) @ H @ (t - w0), {"w": t}, 0.1, 2.0, 200)
    assert got == pytest.approx(0.5 * 0.01 * float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)


def test_worst_of_a_line_is_known_in_both_norms():
    c, w = (torch.randn(9, generator=rng(), dtype=torch.float64) for _ in range(2))
    for p, want in ((2.0, float((c * w).norm())), (float("inf"), float((c * w).abs().sum()))):
        t = w.clone()
        assert worst(lambda t=t: c @ t, {"w": t}, 0.05, p, 3) == pytest.approx(0.05 * want, rel=1e-6)
        assert torch.equal(t, w) and not t.requires_grad


def test_rescaled_units_are_as_sharp():
    """relu(k W1 x) / k: the same function, the same adaptive sharpness, in both cases."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 5, generator=rng()), torch.randn(32, 2, generator=rng())
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)).double()
    loss = lambda: (net(x.double()) - y).square().mean()
    measure = lambda: [worst(loss, dict(net.named_parameters()), 0.05, p, 4) for p in (2.0, float("inf"))] + [
        average(loss, dict(net.named_parameters()), 0.05, 3)]  # fmt: skip
    before = measure()
    k = torch.rand(8, generator=rng(), dtype=torch.float64) + 0.5
    with torch.no_grad():
        net[0].weight.mul_(k[:, None])
        net[2].weight.div_(k)
    assert measure() == pytest.approx(before, rel=1e-9) and min(before[:2]) > 0


def subject(scale=0.02, wild=None):
    base = tiny("llama")
    d = {
        n: Dense(scale * torch.randn(p.shape, generator=rng()) * (30 if wild and wild in n else 1))
        for n, p in base.parameters()
    }
    return SimpleNamespace(base=base, delta=Delta(d)), {n: p.detach().clone() for n, p in base.parameters()}


def test_ends_of_the_way_and_nothing_is_left_behind():
    it, before = subject()
    path, batches = Path(it, "x"), [tokens(4)]
    loss = loss_of(it.base.model, batches)
    values = {}
    for a in (0.0, 0.5, 1.0):
        with path.at(a), torch.no_grad():
            values[a] = float(loss())
    assert all(torch.equal(p, before[n]) for n, p in it.base.parameters())
    assert values[0.0] == float(loss().detach())
    it.base.apply(it.delta * 0.5)
    assert values[0.5] == pytest.approx(float(loss().detach()), abs=1e-5)
    it.base.reset()
    it.base.apply(it.delta)
    assert values[1.0] == pytest.approx(float(loss().detach()), abs=1e-5)
    assert sorted(path.layers) == ["model.layers.0", "model.layers.1", "outside"]
    few = {"rows": 4, "length": 6}
    found = parts.build({"diagnose.sharpness": {**few, "at": [0.0, 1.0]}}).diagnose(it)
    assert [r["at"] for r in found["path"]] == [0.0, 1.0] and len(found["layers"]) == 3
    whole = found["path"][-1]["sharpness"]
    assert all(0 < r["sharpness"] <= whole * 1.05 for r in found["layers"])  # a layer's ball lies in the whole's


def test_the_layers_that_break_the_line_are_found_and_mended():
    """A loss with a hump of known height on the way of each layer."""
    it, _ = subject()
    path = Path(it, "x")
    height = {"model.layers.0": 0.1, "model.layers.1": 2.0, "outside": -0.2}
    probe = {layer: names[0] for layer, names in path.layers.items()}
    known = dict(it.base.parameters())
    share = lambda n: (known[n] - path.start[n]).norm() / (path.end[n] - path.start[n]).norm()
    loss = lambda: sum(4 * h * share(probe[k]) * (1 - share(probe[k])) for k, h in height.items())
    found = parts.build({"diagnose.interpolation": {"points": 3}}).scan(path, loss)
    got = {r["layer"]: r["barrier"] for r in found["layers"]}
    assert got == pytest.approx({**height, "outside": 0.0}, abs=1e-4)  # the hollow has no barrier
    assert found["barrier"] == pytest.approx(1.9, abs=1e-4) and found["stragglers"] == ["model.layers.1"]
    merged = parts.build(found["mend"]).merge(it.base, [it.delta])
    for n in merged.changes:
        kept = float((merged.changes[n].delta() != 0).float().mean())
        assert kept == pytest.approx(0.5 if "layers.1." in n else 1.0, abs=0.02), n
    whole = parts.build({"diagnose.interpolation": {"rows": 4, "length": 8}}).diagnose(it)
    at = [r["at"] for r in whole["path"]]
    assert whole["barrier"] == pytest.approx(barrier(at, [r["loss"] for r in whole["path"]]))


def test_barrier_and_refusals():
    at = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert barrier(at, [(a - 0.5) ** 2 for a in at]) == 0 and barrier(at, [1 - (a - 0.5) ** 2 for a in at]) == pytest.approx(
        0.25
    )
    with pytest.raises(UserError, match="give both"):
        parts.build("diagnose.sharpness").diagnose(SimpleNamespace(base=tiny("llama"), delta=None))
    for bad in ({"rho": 0.0}, {"at": [2.0]}):
        with pytest.raises(UserError):
            parts.build({"diagnose.sharpness": bad})
