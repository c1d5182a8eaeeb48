"""Tuning contributions: what is added block by block adds up, and scaling it by 0 and 1 gives the two models."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from temperament import parts
from temperament.delta import Delta, Dense
from temperament.engine.contribution import Scaled, contributions
from temperament.engine.measure import System
from temperament.engine.session import how
from temperament.engine.tokens import Sampling
from temperament.errors import UserError
from temperament.methods.adapters.lofit import HeadOffset
from temperament.methods.decode.ftc_scaling import FTCScaling
from temperament.methods.diagnose.tuco import TuCo, auc, tuco
from temperament.nn.taps import taps
from temperament.train.live import Live
from tests.methods.drive import carried_out, fresh, recipe, tiny
from tests.models import VOCAB
from tests.train.rows import context

G = torch.Generator().manual_seed(fresh())
PROMPTS = [torch.randint(5, VOCAB, (int(n),), generator=G).tolist() for n in torch.randint(1, 9, (7,), generator=G)]
IDS = {"input_ids": torch.randint(5, VOCAB, (3, 8), generator=G), "use_cache": False}


def change(base, where: str = "all-linear", by: float = 0.05) -> Delta:
    """A random dense change of these matrices."""
    names = [p.parameters["weight"] for p in base.places.match(where)]
    known = dict(base.parameters())
    return Delta({n: Dense(by * torch.randn(known[n].shape, generator=G)) for n in names})


@torch.no_grad()
def logits(model):
    return model(**IDS).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_base_stream_and_contributions_add_up_to_the_last_state(name):
    base = tiny(name)
    base.apply(change(base))
    ptc, ftc = contributions(base, PROMPTS, batch=3)
    blocks = base.places.blocks()
    assert ptc.shape == ftc.shape and len(ptc) == len(blocks) and float(ftc.norm()) > 0
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad(), taps(base.model, blocks[0], at="input") as x, taps(base.model, blocks[-1]) as y:
            base.model(input_ids=torch.tensor([prompt]))
        want = y[blocks[-1]][0, -1] - x[blocks[0]][0, -1]
        assert torch.allclose((ptc + ftc)[:, i].sum(0), want, atol=1e-4)
    assert all("_pieces" not in b.module.__dict__ for b in blocks)  # nothing stays behind


def test_contributions_by_hand():
    """The tuned trajectory by taps, and the base's own blocks called with what it gave them."""
    base = tiny()
    delta, blocks = change(base), base.places.blocks()
    base.apply(delta)
    ptc, ftc = contributions(base, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        kept = []
        keep = lambda m, args, kwargs, out, kept=kept: kept.append((args, kwargs, out))
        handles = [b.module.register_forward_hook(keep, with_kwargs=True) for b in blocks]
        with torch.no_grad():
            base.model(input_ids=torch.tensor([prompt]), use_cache=False)
        [h.remove() for h in handles]
        base.reset()
        with torch.no_grad():
            for k, (args, kwargs, out) in enumerate(kept):
                x = args[0] if args else kwargs["hidden_states"]
                before = blocks[k].module(*args, **kwargs)
                assert torch.allclose(ptc[k, i], (before - x)[0, -1], atol=1e-5)
                assert torch.allclose(ftc[k, i], (out - before)[0, -1], atol=1e-5)
        base.apply(delta)


def test_alpha_one_is_the_tuned_model_and_alpha_zero_the_base():
    base = tiny()
    before = logits(base.model)
    base.apply(change(base))
    tuned = logits(base.model)
    assert not torch.allclose(tuned, before, atol=1e-3)
    assert torch.allclose(logits(Scaled(base, 1.0)), tuned, atol=1e-5)
    assert torch.equal(logits(Scaled(base, 0.0)), before)
    assert torch.equal(logits(base.model), tuned)


def test_where_each_blocks_last_map_alone_is_tuned_it_is_the_dial():
    """A block is linear in the map that ends it, so PTC + alpha FTC is the block at strength alpha, in every block at once."""
    base, alpha = tiny(), random.uniform(-1, 2)
    delta = change(base, "down_proj", by=0.3)
    base.apply(delta)
    scaled = logits(Scaled(base, alpha))
    base.reset()
    base.apply(delta, alpha)
    assert torch.allclose(scaled, logits(base.model), atol=1e-4)


def test_modules_that_tuning_added_are_scaled_too():
    base = tiny()
    before = logits(base.model)
    live = Live(base, [HeadOffset(by="random", share=0.5, std=0.3).build(base, context(base, seed=fresh()))])
    delta = live.delta()
    live.close()
    assert delta.additions
    base.apply(delta)
    tuned = logits(base.model)
    assert torch.equal(logits(Scaled(base, 0.0)), before) and torch.allclose(logits(Scaled(base, 1.0)), tuned, atol=1e-5)
    assert float(contributions(base, PROMPTS)[1].norm()) > 0


def test_a_system_decodes_with_it():
    base, sampling = tiny(), Sampling(max_new=10)
    say = lambda *inference: System(base, inference).generate(PROMPTS, sampling).ids
    plain = say()
    assert FTCScaling(0.5).models(base) == {}  # nothing was tuned
    base.apply(change(base, by=0.3))
    tuned = say()
    assert say(FTCScaling(0.0)) == plain != tuned and say(FTCScaling(1.0)) == tuned == say(FTCScaling(1.0 + 1e-6))
    assert say() == tuned and how(Scaled(base, 0.5)).cache == "none"


def test_tuco_between_0_and_1_and_at_its_ends():
    ptc, ftc = torch.randn(2, 4, 6, 9, generator=G)
    for norm in (1, 2):
        t = tuco(ptc, ftc, norm)
        assert t.shape == (4, 6) and bool(((t > 0) & (t < 1)).all())
        size = lambda x, norm=norm: x.double().sum(0).norm(p=norm, dim=-1)
        assert torch.allclose(t[-1], size(ftc) / (size(ptc) + size(ftc)))
        assert torch.allclose(tuco(3.7 * ptc, 3.7 * ftc, norm), t)
        assert torch.equal(tuco(ptc, 0 * ftc, norm), torch.zeros(4, 6, dtype=torch.double))
        assert torch.equal(tuco(0 * ptc, ftc, norm), torch.ones(4, 6, dtype=torch.double))
    a, b = torch.randn(40, generator=G), torch.randn(30, generator=G)
    assert auc(a, b) == pytest.approx(sum((x > y) + 0.5 * (x == y) for x in a.tolist() for y in b.tolist()) / 1200)
    assert auc(a, a) == pytest.approx(0.5)


def test_an_untouched_model_has_none():
    base = tiny()
    for delta in (None, change(base, by=0.0)):
        found = TuCo(items=5).diagnose(SimpleNamespace(base=base, delta=delta))
        assert found["tuco"] == 0 and set(found["sets"][0]["values"]) == {0.0} and not base.originals
    more = [TuCo(items=5).diagnose(SimpleNamespace(base=base, delta=change(base, by=by)))["tuco"] for by in (0.01, 0.3)]
    assert 0 < more[0] < more[1] < 1
    with pytest.raises(UserError, match="no tokenizer"):
        part = parts.build({"diagnose.tuco": {"sets": {"a": {"data.lab": {"skills": ["add"], "rows": 3}}}}})
        part.diagnose(SimpleNamespace(base=SimpleNamespace(tokenizer=None, reset=lambda: None), delta=None))
    with pytest.raises(UserError, match="norm"):
        parts.build({"diagnose.tuco": {"norm": 3}})


def test_from_a_recipe_with_its_diagnosis_and_scaled(tmp_path):
    rows = lambda name: {"data.lab": {"skills": [name], "rows": 6}}
    document = recipe("select.full", steps=3, rate=3e-3)
    document["evaluation"] |= {"diagnose": [{"diagnose.tuco": {"sets": {"new": rows("shift"), "old": rows("people")}}}]}
    run = carried_out(document | {"inference": [{"decode.ftc_scaling": {"alpha": 0.9}}]}, tmp_path / "run")
    found = run.json["diagnoses"]["diagnose.tuco"]
    assert [s["set"] for s in found["sets"]] == ["new", "old"] and 0 < found["tuco"] < 1 and len(found["layers"]) == 4
    assert found["layers"][-1]["new"] == pytest.approx(found["tuco"])
