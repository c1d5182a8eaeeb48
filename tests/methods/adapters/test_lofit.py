"""LoFiT: no change at zero, merged factors and offsets, the heads of one step in the next, an addition that loads again."""

from __future__ import annotations

import torch

from temperament.bases.load import load
from temperament.delta import Delta
from temperament.methods.adapters.lofit import HeadOffset, HeadScale
from temperament.methods.optim.adamw import AdamW
from temperament.train.live import Live
from tests.methods.drive import carried_out, few, fresh, killed, laws, step, steps, tiny
from tests.train.rows import context

IDS = {"input_ids": torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(fresh()))}


def logits(base):
    with torch.no_grad():
        return base.model(**IDS).logits


def test_zero_is_the_identity():
    for part in (HeadScale(std=0.0), HeadOffset(by="random", share=0.5, std=0.0)):
        base = tiny()
        before = logits(base)
        Live(base, [part.build(base, context(base))])
        assert torch.equal(logits(base), before)


def test_factors_merge_into_the_output_projection():
    for name in ("llama", "gpt2"):
        base = tiny(name)
        live = Live(base, [HeadScale(std=0.3).build(base, context(base, seed=fresh()))])
        on, delta = logits(base), live.delta()
        live.close()
        base.apply(delta)
        assert torch.allclose(logits(base), on, atol=1e-5)


def test_an_offset_is_a_bias_of_the_projection():
    base = tiny("gpt2")  # its projections have biases: the offset merges
    live = Live(base, [HeadOffset(by="random", share=0.4, std=0.3).build(base, context(base, seed=fresh()))])
    on, delta = logits(base), live.delta()
    assert not delta.additions and all(n.endswith("bias") for n in delta.changes)
    live.close()
    base.apply(delta)
    assert torch.allclose(logits(base), on, atol=1e-5)


def test_an_offset_without_a_bias_is_added_and_built_again(tmp_path):
    base = tiny()
    before = logits(base)
    live = Live(base, [HeadOffset(by="random", count=3, std=0.3).build(base, context(base, seed=fresh()))])
    assert sum(p.tensor.numel() for p in live.params.values()) == 3 * base.places.role("o")._places.popitem()[1].head_dim
    on, delta = logits(base), live.delta()
    live.close()
    assert torch.equal(logits(base), before)
    delta.save(tmp_path / "delta")
    read = Delta.load(tmp_path / "delta")
    base.apply(read)
    assert torch.equal(logits(base), on) and not torch.allclose(on, before)
    with base.at("base"):
        assert torch.equal(logits(base), before)
    base.reset()
    assert torch.equal(logits(base), before)
    base.apply(read * 0.0)
    assert torch.equal(logits(base), before)


def test_only_the_chosen_heads_learn_and_all_else_is_frozen():
    base = tiny()
    before = {n: p.detach().clone() for n, p in base.parameters()}
    player = steps(base, 2, trainable=[HeadOffset(by="random", count=2)], optimizer=AdamW(lr=1e-1))
    shifts = [o.shift(32).view(4, 8) for _, o in player.live.parts[0].around.values()]
    assert sum(int((s.norm(dim=1) > 0).sum()) for s in shifts) == 2
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in base.parameters())


def test_heads_are_found_by_the_factors_of_another_step(tmp_path):
    base = tiny()
    live = Live(base, [HeadScale(std=0.1).build(base, context(base, seed=fresh()))])
    sizes = {n.partition(".weight")[0]: p.tensor.detach().norm(dim=1) for n, p in live.params.items()}
    live.delta().save(tmp_path / "scales" / "delta")
    live.close()
    part = HeadOffset(of="scales", count=3)
    ctx = context(base, artefacts={"scales": tmp_path / "scales"})
    found = part.scores(base, ctx, [p for p in base.places if p.role == "o"])
    assert all(torch.allclose(found[n], s, atol=1e-4) for n, s in sizes.items())
    kept = torch.cat([found[n][h] for n, h in part.choose(found, 0).items()])
    assert torch.equal(kept.sort().values, torch.cat(list(found.values())).sort().values[-3:])


def test_the_exactness_law():
    for part in (HeadScale(), HeadOffset(by="random", share=0.5)):
        laws(tiny(), trainable=[part])


def recipe():
    l1 = {"regularizers.l1": {"of": "new", "per_entry": False, "weight": 5e-4}}
    return {
        "base": "lab/lm", "check": False, "evaluation": {**few(), "dial": {"strengths": [0.0, 0.5], "items": 2}},
        "steps": [
            {"name": "scales", "ledger": False, "train": step("adapters.head_scale", 3, regularizers=[l1])},
            {"name": "offsets", "start": "base", "train": step({"adapters.head_offset": {"of": "scales", "count": 2}}, 4)},
            {"name": "more", "ledger": False, "train": step({"adapters.head_offset": {"by": "random", "count": 2}}, 2)},
        ],
    }  # fmt: skip


def test_as_steps_of_a_recipe_killed_in_the_second(tmp_path):
    whole, broken = carried_out(recipe(), tmp_path / "a"), killed(recipe(), tmp_path / "b", after=2, step="offsets")
    assert whole.delta.digest == broken.delta.digest
    live = whole.model(**IDS).logits.detach().clone()
    again = load(tmp_path / "a")  # the run as a model: base, and what was added built again
    assert torch.equal(again.model(**IDS).logits, live) and len(again.hung) == len(whole.delta.additions)
