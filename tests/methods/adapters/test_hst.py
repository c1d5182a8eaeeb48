"""Hierarchical side-tuning: its formula by hand, the base untouched and without gradient where it is said to be, what is saved
is what was trained."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import gradients, images, live, rng, seeing, shake

from temperament import parts
from temperament.delta import Delta
from temperament.engine import see
from temperament.engine.pictures import normalised
from temperament.errors import UserError
from temperament.methods.adapters.side.hst import HST, Meta, Side
from temperament.run.tune import tune

SMALL = {"classes": list("abcde"), "widths": [8, 12], "heads": [2, 3]}
APART = {"meta": False, "norms": False}
PLAIN = "objectives.classify.cross_entropy"


def beside(base, away: float = 0.1, **options):
    return shake(live(base, {"adapters.side.hst": {**SMALL, **options}}), away)


def side_of(it) -> Side:
    return next(piece for part in it.parts for _, piece in part.around.values() if isinstance(piece, Side))


def leaves(value: torch.Tensor) -> set[int]:
    """Every leaf tensor the graph of a value ends in."""
    seen, found, todo = set(), set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [n for n, _ in node.next_functions]
    return found


# ---- the base --------------------------------------------------------------------------------------------------------------


def test_without_tokens_and_norms_the_base_is_untouched_and_no_gradient_goes_through_it():
    base, rows = seeing(), images()
    with torch.no_grad():
        pure = see.logits(base.model, base, rows.pixels)
    it = beside(base, **APART)
    states = []
    hooks = [b.module.register_forward_hook(lambda m, a, out: states.append(out)) for b in base.places.blocks()]
    own = see.logits(base.model, base, rows.pixels)
    said = see.logits(base.model, base, rows.pixels, "side")
    for hook in hooks:
        hook.remove()
    assert torch.equal(own, pure) and not own.requires_grad and said.requires_grad
    assert len(states) == 4 and not any(h.requires_grad or h.grad_fn for h in states)  # no graph in the base at all
    assert leaves(said) == {id(p.tensor) for p in it.params.values()}
    got, _ = gradients(it, parts.build(PLAIN), rows, 2)
    assert all(g.norm() > 0 for n, g in got.items() if not n.endswith("k.bias"))  # (all keys moved alike change no softmax)
    assert all(p.grad is None for _, p in base.parameters())
    with torch.no_grad():
        assert torch.equal(see.logits(base.model, base, rows.pixels), pure)


@pytest.mark.parametrize("options", [{}, {"norms": False}, {"meta": False}])
def test_the_full_one_trains_tokens_and_norms_and_nothing_else_of_the_base(options):
    base, rows = seeing(), images()
    with torch.no_grad():
        pure = see.logits(base.model, base, rows.pixels)
    it = beside(base, **options)
    said = see.logits(base.model, base, rows.pixels, "side")
    tokens = [n for n in it.params if n.endswith(":token")]
    inner = [n for n in it.params if "layernorm" in n]
    assert len(tokens) == 2 * options.get("meta", True) and len(inner) == 8 * options.get("norms", True)
    # (the norm behind the last block is outside of them; of the last block all that its class token alone reads counts too)
    assert leaves(said) == {id(p.tensor) for p in it.params.values()}
    assert not torch.allclose(see.logits(base.model, base, rows.pixels), pure, atol=1e-4)
    with it.at("base"), torch.no_grad():
        assert torch.equal(see.logits(it.model, base, rows.pixels), pure)
    it.close()
    base.reset()
    with torch.no_grad():
        assert torch.equal(see.logits(base.model, base, rows.pixels), pure)


def test_what_lies_below_it_learns_through_it():
    base, rows = seeing(), images()
    it = shake(live(base, {"adapters.lora": {"rank": 2}}, {"adapters.side.hst": {**SMALL, **APART}}))
    got, _ = gradients(it, parts.build(PLAIN), rows, 5)
    assert sum(float(g.norm()) for n, g in got.items() if n.endswith((":A", ":B"))) > 0


# ---- the formula -----------------------------------------------------------------------------------------------------------


def by_hand(side: Side, pixels, states, asked):
    """The docstring's formula; each token looks at two keys by an explicit softmax."""
    t = lambda m, x: F.linear(x, m.weight, m.bias)
    ln = lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * m.weight + m.bias
    x = F.conv2d(pixels, side.stem[0].weight, None, 2, 1)
    flat = x.flatten(1)
    x = ((flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-5).sqrt()).view_as(x)
    x = (x * side.stem[1].weight[:, None, None] + side.stem[1].bias[:, None, None]).relu()
    x = F.conv2d(x, side.stem[3].weight, side.stem[3].bias, 2)
    maps = []
    for i in range(len(side.enter)):
        if i:
            x = F.conv2d(x, side.down[i - 1].weight, side.down[i - 1].bias, 2, 1)
        (rows, d, high, wide), out = x.shape, []
        for r in range(rows):
            tokens = ln(side.enter[i], x[r].reshape(d, -1).T)
            for k, block in enumerate(side.read):
                if side.stage[k] != i:
                    continue
                g = int((states[k].shape[1] - 1) ** 0.5)
                grid = states[k][r, 1:].T.reshape(1, -1, g, g)
                patches = t(side.bridge[i], F.interpolate(grid, (high, wide), mode="bilinear")[0].reshape(grid.shape[1], -1).T)
                keys = torch.stack([ln(block.whole, t(side.bridge[i], asked[k][r])), patches.mean(0)])
                q, key, value = t(block.q, ln(block.one, tokens)), t(block.k, keys), t(block.v, keys)
                size, mixed = d // block.heads, []
                for h in range(block.heads):
                    on = slice(h * size, (h + 1) * size)
                    a, b = (q[:, on] @ key[j, on] / size**0.5 for j in (0, 1))
                    first = (1 / (1 + (b - a).exp()))[:, None]
                    mixed.append(first * value[0, on] + (1 - first) * value[1, on])
                tokens = tokens + t(block.o, torch.cat(mixed, 1)) + patches
                tokens = tokens + t(block.out, F.gelu(t(block.up, ln(block.two, tokens))))
            out.append(ln(side.leave[i], tokens).T.reshape(d, high, wide))
        x = torch.stack(out)
        maps.append(x)
    h = x.flatten(2).mean(2)
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    return maps, h @ side.linear.weight.T + side.linear.bias


@torch.no_grad()
@pytest.mark.parametrize("meta", [True, False])
def test_it_is_its_formula(meta):
    base, rows = seeing(), images(3)
    it = beside(base, 0.2, meta=meta)
    side, pixels, vit = side_of(it), normalised(base, rows.pixels), base.model.vit
    tokens = [p.token for part in it.parts for _, p in part.around.values() if isinstance(p, Meta)]
    h, states, asked = vit.embeddings(pixels), [], []
    it.switch.on = False  # the blocks themselves, one after the other
    for k, layer in enumerate(vit.layers):
        if meta:
            h = layer(torch.cat([tokens[k].expand(3, 1, -1), h], 1))
            asked, h = [*asked, h[:, 0]], h[:, 1:]
        else:
            h = layer(h)
            asked = [*asked, h[:, 0]]
        states.append(h)
    it.switch.on = True
    maps, want = by_hand(side, pixels, states, asked)
    assert torch.allclose(see.logits(base.model, base, rows.pixels, "side"), want, atol=1e-4)
    for a, b in zip(maps, side.maps(pixels, states, asked), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    # the base's own head reads the same trunk
    assert torch.allclose(see.logits(base.model, base, rows.pixels), base.model.classifier(vit.layernorm(h)[:, 0]), atol=1e-5)


def formula(D, blocks, d, expand, classes, meta=True, norms=True):
    per = len(blocks) and [k * len(d) // len(blocks) for k in range(len(blocks))]
    inside = sum(4 * (d[i] ** 2 + d[i]) + 2 * int(expand * d[i]) * d[i] + int(expand * d[i]) + d[i] + 6 * d[i] for i in per)
    stem = 27 * d[0] + 2 * d[0] + 4 * d[0] ** 2 + d[0]
    down = sum(9 * a * b + b for a, b in pairwise(d))
    stages = sum(4 * n + D * n + n for n in d)
    return inside + stem + down + stages + classes * (d[-1] + 1) + len(blocks) * (meta * D + norms * 4 * D)


def test_sizes_are_those_of_the_paper():
    config = SimpleNamespace(hidden_size=768, patch_size=16)
    names = [f"e/blocks.{k}" for k in range(12)]
    side = Side(HST(classes=["a", "b"]), "ab", names, config)
    many = sum(p.numel() for p in side.parameters()) + 12 * 5 * 768
    assert many == formula(768, names, [32, 48, 64, 72], 4, 2) and 0.7e6 < many < 0.82e6  # 0.78 million
    assert side.stage == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    states, asked = torch.randn(12, 2, 17, 768, generator=rng()), torch.randn(12, 2, 768, generator=rng())
    with torch.no_grad():
        maps = side.maps(torch.rand(2, 3, 64, 64, generator=rng()), states, asked)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 16, 16), (2, 48, 8, 8), (2, 64, 4, 4), (2, 72, 2, 2)]
    base = seeing()
    it = beside(base)
    want = formula(base.model.config.hidden_size, base.places.blocks(), [8, 12], 4, 5)
    assert sum(p.tensor.numel() for p in it.params.values()) == want


# ---- training and what is left ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, APART])
def test_any_split_gives_the_same_gradient_and_at_the_start_every_class_is_as_likely(options):
    base, rows = seeing(), images(6)
    it = live(base, {"adapters.side.hst": {**SMALL, **options}})
    _, told = gradients(it, parts.build(PLAIN), rows, 3)
    assert told.terms["cross_entropy"] == pytest.approx(torch.tensor(5.0).log().item(), rel=1e-5)
    shake(it)
    a, b = (gradients(it, parts.build(PLAIN), rows, micro)[0] for micro in (6, 1))
    size = sum(float(g.square().sum()) for g in a.values()) ** 0.5
    assert all(float((a[n] - b[n]).norm()) < 1e-5 * size for n in a)


@pytest.mark.parametrize("options", [{}, {"meta": False}])
def test_saved_and_loaded_it_says_the_same_and_at_strength_0_it_is_the_base(tmp_path, options):
    base, rows = seeing(), images()
    look = lambda head=None: see.logits(base.model, base, rows.pixels, head)
    with torch.no_grad():
        pure = look()
        it = beside(base, **options)
        own, said, delta = look(), look("side"), it.delta()
        it.close()
        base.reset()
        delta.save(tmp_path / "d")
        base.apply(Delta.load(tmp_path / "d"))
        assert torch.allclose(look(), own, atol=1e-6) and torch.allclose(look("side"), said, atol=1e-6)
        with base.at("base"):
            assert torch.equal(look(), pure)
        base.reset()
        base.apply(delta, 0.0)
        assert torch.equal(look(), pure) and float(look("side").abs().max()) == 0
        base.reset()


def test_from_a_recipe(tmp_path):
    base = seeing()
    source = {"data.sprites": {"rows": 20}}
    head = {"of": source, "widths": [8, 12], "heads": [2, 3]}
    step = {"source": source, "objective": PLAIN, "trainable": {"adapters.side.hst": head}, "steps": 3, "batch": 4, "micro": 2}
    suites = [{"evaluate.pictures": {"of": source, "items": 4}}]
    document = {"base": "lab/vit", "steps": [{"name": "one", "train": step}],
                "evaluation": {"suites": suites, "keep": False, "base": False, "diagnose": []}}  # fmt: skip
    run = tune(document, tmp_path / "run", base=base)
    assert run.json["status"] == "done" and {"image_encoder/side.side"} <= set(run.delta.additions)


def test_it_is_told_what_it_cannot_do():
    with pytest.raises(UserError, match="vision transformer"):
        live(seeing("resnet"), {"adapters.side.hst": SMALL})
    with pytest.raises(UserError, match=r"widths.*2 blocks"):
        live(seeing(), {"adapters.side.hst": {"classes": ["a", "b"]}})
    for wrong in ({"heads": [3, 3]}, {"heads": [2]}, {"classes": ["a"]}, {"name": "a b"}):
        with pytest.raises(UserError):
            parts.build({"adapters.side.hst": {**SMALL, **wrong}})
