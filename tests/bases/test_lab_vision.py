"""The lab's image bases as shipped: they do what their cards say, and visibly fail where something is left to be learnt."""

import json

import pytest
import torch
from tiny import seed

from temperament import parts
from temperament.bases.load import LAB, load
from temperament.bases.train_vision import PLANS, measured
from temperament.engine.measure import System
from temperament.run.skills import Asking

BASES = ["vit", "cnn", "clip", "clip-b"]


@pytest.mark.parametrize("name", BASES)
def test_it_knows_what_it_is_meant_to_know(name):
    base = load(f"lab/{name}")
    assert next(iter(base.components)) == ("encoder" if name.startswith("clip") else "image_encoder")
    skills = [s for suite in base.suites for s in parts.build(suite).skills(Asking(base, 200, 0))]
    for skill in skills:
        got = skill.measure(System(base))
        assert sum(o.score for o in got) / len(got) >= 0.95, skill.name
        assert all(o.kl == 0 for o in got)
    told = json.loads((LAB / name / "measured.json").read_text())
    away = ("severity", "shifted")
    assert min(v for k, v in told.items() if not any(w in k for w in away)) >= 0.95
    assert min(told.values()) < 0.7  # and there are domains where it fails
    found = measured(base.model, PLANS[name], 100)
    assert found.keys() == told.keys() and all(abs(v - told[k]) < 0.15 for k, v in found.items())


def test_two_seeds_are_two_models_of_one_kind():
    a, b = load("lab/clip"), load("lab/clip-b")
    assert a.sha256 != b.sha256 and a.model.config.to_dict().keys() == b.model.config.to_dict().keys()
    assert a.tokenizer.get_vocab() == b.tokenizer.get_vocab()


def test_a_batchnorm_base_trains_with_its_statistics_fixed():
    from temperament.run.training import quiet_training

    base = load("lab/cnn")
    norms = [m for m in base.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    was = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
    assert norms and any(float(m.abs().max()) > 0.01 for m, _ in was)
    quiet_training(base.model)
    torch.manual_seed(seed())
    base.model(pixel_values=torch.randn(4, 3, 16, 16)).logits.sum().backward()
    assert all(torch.equal(m.running_mean, a) and torch.equal(m.running_var, b) for m, (a, b) in zip(norms, was, strict=True))
