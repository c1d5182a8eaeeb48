"""DR-Tune by its formula, row by row; the bank counts once, moves once a step, holds no encoder, and survives a kill."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import at_work, gradients, images, live, rng, seed, seeing, shake, views

from temperament import parts
from temperament.engine import see
from temperament.errors import UserError
from temperament.methods.regularizers.dr_tune import Bank, calibrated
from temperament.nn.linalg import rotation
from temperament.protocols import Progress
from temperament.run.artefacts import Folder
from temperament.run.recipe import Save, read
from temperament.run.training import run_train
from tests.train.rows import context


def orthogonal(d: int, sign: float) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(d, d, generator=rng(), dtype=torch.float64)).Q
    q[:, 0] *= sign * torch.linalg.det(q).sign()
    return q


def test_a_rotation_is_recovered_and_a_mirror_is_none():
    X = torch.randn(40, 7, generator=rng(), dtype=torch.float64)
    Q, mirror = orthogonal(7, 1.0), orthogonal(7, -1.0)
    assert torch.allclose(rotation(X, X @ Q.T), Q, atol=1e-9)
    R = rotation(X, X @ mirror.T)
    assert torch.linalg.det(R) == pytest.approx(1.0) and torch.allclose(R @ R.T, torch.eye(7, dtype=R.dtype), atol=1e-9)
    apart = lambda R: float((X @ R.T - X @ mirror.T).norm())
    near = [orthogonal(7, 1.0) for _ in range(50)]
    assert all(apart(R) <= apart(other) for other in near)  # of all rotations the nearest


def test_features_that_only_turned_are_found_again_whatever_the_base_knows():
    kept, Q = torch.randn(60, 5, generator=rng()), orthogonal(5, 1.0).float()
    labels, w = torch.randint(0, 3, (60,), generator=rng()), torch.zeros(3, 5)  # a head that is sure of nothing
    tuned = 1.7 * kept @ Q.T
    got = calibrated(kept, tuned, labels, w, 2.5)
    assert torch.allclose(got, 2.5 * F.normalize(tuned, dim=1), atol=1e-4)
    assert torch.allclose(calibrated(kept, kept, labels, w, 1.0), F.normalize(kept, dim=1), atol=1e-5)  # nothing has moved


@pytest.mark.parametrize("turn", [True, False])
def test_calibration_step_by_step(turn):
    K, d, classes, r = 30, 4, 3, rng()
    kept, tuned, w = (torch.randn(n, d, generator=r, dtype=torch.float64) for n in (K, K, classes))
    labels = torch.randint(0, classes - 1, (K,), generator=r)  # one class is not in the bank
    P, D = ([v / v.norm() for v in x] for x in (kept, tuned))
    mean = lambda vs: sum(vs) / len(vs)
    if turn:
        mp, md = mean(P), mean(D)
        U, _, Vh = torch.linalg.svd(sum(torch.outer(p - mp, q - md) for p, q in zip(P, D, strict=True)))
        fix = torch.diag(torch.tensor([1.0] * (d - 1) + [float(torch.linalg.det(Vh.T @ U.T))], dtype=torch.float64))
        P = [Vh.T @ fix @ U.T @ (p - mp) + md for p in P]
    for c in labels.unique().tolist():
        of = [k for k in range(K) if labels[k] == c]
        sure = torch.stack([D[k] @ w[c] / w[c].norm() for k in of]).softmax(0)
        to = sum(s * D[k] for s, k in zip(sure, of, strict=True))
        shift = to - mean([P[k] for k in of])
        for k in of:
            P[k] = P[k] + shift
        assert torch.allclose(mean([P[k] for k in of]), to)  # centres coincide, before the length is set
    want = torch.stack([3.0 * p / p.norm() for p in P])
    assert torch.allclose(calibrated(kept, tuned, labels, w, 3.0, turn), want, atol=1e-9)


def tuned_away(kind: str):
    """A base whose weights have moved, with a head of five classes of its own."""
    base = seeing(kind)
    it = shake(live(base, "select.full", {"adapters.class_head": {"classes": list("abcde")}}), 0.05)
    return base, it


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_batch_and_bank_are_one_mean_and_the_encoder_is_not_held(kind, calibrate):
    (base, it), rows, before = tuned_away(kind), images(6), images(9)
    plain = parts.build("objectives.classify.cross_entropy")
    bank = at_work(parts.build({"regularizers.dr_tune": {"bank": 8, "calibrate": calibrate}}), it, before)
    without, alone = gradients(it, plain, rows, 6)
    got, told = gradients(it, plain, rows, 4, [bank])
    head = {n: g for n, g in got.items() if "head." in n}
    assert all(torch.allclose(g, without[n], rtol=1e-4, atol=1e-6) for n, g in got.items() if n not in head)
    # by hand: one cross-entropy over the rows and the bank, through the head
    with it.at("base") as model:
        p, y = see.features(model, base, before.pixels)[:8].detach(), before.labels[:8]
    z = see.features(base.model, base, rows.pixels).detach()
    w, b = (it.params[next(n for n in head if n.endswith(k))].tensor for k in ("weight", "bias"))
    if calibrate:
        p = calibrated(p, p, y, w.detach(), float(z.norm(dim=1).mean()))
    both = F.cross_entropy(torch.cat([z, p]) @ w.T + b, torch.cat([rows.labels, y]))
    want = dict(zip(head, torch.autograd.grad(both, [it.params[n].tensor for n in head]), strict=True))
    share = (6 + 8) / 6  # the batch's mean has weight 1 here
    assert told.loss == pytest.approx(share * float(both.detach()), rel=1e-4) and told.counts["dr_tune"] == 8
    assert all(torch.allclose(head[n], share * want[n], atol=1e-5) for n in head)
    nothing = at_work(parts.build("regularizers.dr_tune"), it)  # a bank of nothing is plain cross-entropy
    assert gradients(it, plain, rows, 6, [nothing])[1].terms == alone.terms


def test_first_in_first_out_once_a_step():
    base, it = tuned_away("vit")
    part = parts.build({"regularizers.dr_tune": {"bank": 10}})
    first, more = images(10), [images(4) for _ in range(4)]
    bank, plain = at_work(part, it, first), parts.build("objectives.classify.cross_entropy")
    assert torch.equal(bank.tuned, bank.kept) and torch.equal(bank.labels, first.labels)
    for k, rows in enumerate(more):
        rows.labels[k] = -1  # a picture without a class is none of its
        gradients(it, plain, rows, 2, [bank])
        gradients(it, plain, rows, 4, [bank])  # looked at twice: nothing has moved yet
        bank.after_step(Progress(k, 4))
        shake(it, 0.01)
    bank.after_step(Progress(3, 4))
    nameless = images(4)
    nameless.labels[:] = -1
    bank.prepare(nameless, views(it))  # nothing is met, so nothing enters
    assert bank.met is None and bank.loss(None, views(it)) == {}
    bank.after_step(Progress(4, 5))
    known = torch.cat([first.labels, *(r.labels[r.labels >= 0] for r in more)])[-10:]
    assert torch.equal(bank.labels, known) and len(bank.kept) == len(bank.tuned) == 10
    with it.at("base") as model, torch.no_grad():
        last = see.features(model, base, more[-1].pixels[more[-1].labels >= 0])
    assert torch.allclose(bank.kept[-3:], last, atol=1e-5) and not torch.allclose(bank.tuned[-3:], last, atol=1e-3)


def recipe(steps: int = 6):
    return read({"base": "lab/lm", "steps": [{"name": "one", "train": {
        "source": {"data.sprites": {"rows": 23}},
        "objective": "objectives.classify.cross_entropy",
        "trainable": ["select.full", {"adapters.class_head": {"of": "data.sprites"}}],
        "regularizers": [{"regularizers.dr_tune": {"bank": 11, "rotate_every": 2}}],
        "optimizer": {"optim.adamw": {"lr": 0.01}}, "steps": steps, "batch": 5, "micro": 3}}]})  # fmt: skip


@pytest.mark.parametrize("remembers", [True, False])
def test_killed_and_resumed_it_is_the_same(tmp_path, monkeypatch, remembers):
    base, spec = seeing("resnet"), copy.copy(recipe().steps[0].train)
    object.__setattr__(spec, "save", Save(seconds=1e9, steps=2))
    weights, s = copy.deepcopy(base.model.state_dict()), seed()

    def work(folder, die: int = 0) -> str:
        base.reset()
        base.model.load_state_dict(weights)

        def tell(event, **data):
            if die and event == "step" and data["step"] == die:
                raise KeyboardInterrupt

        folder.mkdir(exist_ok=True)
        ctx = context(base, seed=s, batch=spec.batch, micro=spec.micro, folder=folder / "scratch", key="one")
        return run_train(spec, ctx, Folder(folder), "step", "one", lambda live, n: {}, tell).delta.digest

    whole = work(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "killed", die=4)
    if not remembers:
        monkeypatch.setattr(Bank, "load_state_dict", lambda self, state: None)
    assert (work(tmp_path / "killed") == whole) is remembers


def test_it_is_told_what_it_cannot_do():
    _, it = tuned_away("vit")
    rows = images(4)
    rows.labels = None
    with pytest.raises(UserError, match=r"dr_tune.*class"):
        at_work(parts.build("regularizers.dr_tune"), it, rows)
    with pytest.raises(UserError, match="bank"):
        parts.build({"regularizers.dr_tune": {"bank": 0}})
