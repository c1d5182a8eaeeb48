"""DFT and ASFT: closed forms against autograd, on fresh random rows."""

from __future__ import annotations

import pytest
import torch

from temperament.methods.objectives.sft.asft import ASFT
from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
from temperament.methods.objectives.sft.dft import DFT
from temperament.methods.regularizers.kl import KL
from temperament.methods.select.full import Full
from temperament.nn.logprobs import kl, label, score
from temperament.run import laws
from temperament.run.training import build_players
from tests.train.rows import base_of, context, spec, tokens

SEED = int(torch.seed() % 10**6)


@pytest.fixture
def player():
    (one,) = build_players(spec(trainable=[Full()]), context(base_of("llama_tied")))
    with laws.perturbed(one, SEED):  # away from the start, or every divergence is 0
        yield one
    one.live.close()


def gradient(player, objective, batch=None):
    return laws.gradient(player, objective, batch if batch is not None else tokens(4, SEED), 2)


def close(a, b, tolerance=1e-5):
    deviation, where = laws.distance(a[0], b[0])
    assert deviation < tolerance, (deviation, where, SEED)


def test_the_gradient_of_dft_is_minus_that_of_the_probability(player):
    batch = tokens(4, SEED)
    got = gradient(player, DFT(), batch)[0]
    p = score(player.live.model, batch, label())["label"].exp()
    (-(p * batch.weights).sum() / batch.trained).backward()
    want = laws._taken(player)
    close((want,), (got,))


def test_asft_without_an_anchor_is_dft_and_with_one_the_sum(player):
    close(gradient(player, DFT()), gradient(player, ASFT(beta=0.0)))
    for direction in ("forward", "reverse"):
        whole = gradient(player, ASFT(beta=0.3, direction=direction))
        player.regularizers = [KL(0.3, version="start", direction=direction)]
        close(whole, gradient(player, DFT()))
        player.regularizers = []


def test_weight_one_instead_of_p_is_cross_entropy(player, monkeypatch):
    """Weights given to the tokens by hand: DFT is cross-entropy whose detached weights are the probabilities."""
    batch = tokens(4, SEED)
    with torch.no_grad():
        p = score(player.live.model, batch, label())["label"].exp()
    n = batch.trained
    got = gradient(player, DFT(), batch)
    batch.weights = batch.weights * p
    plain = gradient(player, CrossEntropy(), batch)
    scaled = {k: v * (batch.trained / n) for k, v in plain[0].items()}
    close((scaled,), got)


def test_divergence_is_not_negative_and_its_gradient_is_zero_at_the_start():
    (one,) = build_players(spec(trainable=[Full()]), context(base_of("llama")))
    batch = tokens(3, SEED)
    assert laws.distance(gradient(one, ASFT(beta=5.0), batch)[0], gradient(one, DFT(), batch)[0])[0] < 1e-5
    with laws.perturbed(one, SEED):
        for direction in ("forward", "reverse"):
            with torch.no_grad():
                value = score(one.live.model, batch, kl(one.views.view("start"), direction=direction))["kl"]
            assert float(value.min()) > -1e-6 and float(value.sum()) > 0
            assert bool((value[batch.weights == 0] == 0).all())
    one.live.close()


def test_the_law_holds():
    from tests.train.test_exactness import run

    for objective in (DFT(), DFT(per="example"), ASFT(0.3), ASFT(0.3, "reverse", per="example")):
        found, _ = run(base_of("llama_tied"), objective=objective, trainable=[Full()], batch=8)
        assert found["rows together = one by one"].tolerance < 2e-5
