"""Selections, merges and diagnoses by their closed forms."""

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import MODELS
from properties.table import variants
from tiny import context, gradients, live, rng, seed, shake, tiny, tokens

from temperament import parts
from temperament.delta import Delta, Dense, LowRank, Replace
from temperament.errors import UserError
from temperament.methods.diagnose.intruder_dimensions import effective_rank, overlaps
from temperament.methods.select.half import CATEGORIES

DECODERS = ["llama", "llama_tied", "gpt2", "phi3", "gpt_neox", "qwen3", "t5", "vit"]


def chosen(base, s=0, round=0, **options):
    return parts.build({"select.half": options}).choose(base.places, s, round)


def category(place):
    return CATEGORIES.get(place.role, "norm" if place.category == "norm" else place.category)


# ---- select.half -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", DECODERS)
def test_half_of_every_category_in_every_block(arch):
    base = tiny(arch)
    names = chosen(base, seed())
    groups: dict = {}
    for block in base.places.blocks():
        count, all_ = Counter(), Counter()
        for p in block.places:
            all_[category(p)] += 1
            count[category(p)] += p.name in names
        for c, n in all_.items():
            assert n // 2 <= count[c] <= -(-n // 2), (c, n, count[c])
            groups.setdefault((block.stack, c), []).append((count[c], n))
    for key, found in groups.items():  # over the blocks the share holds to the last tensor
        assert sum(c for c, _ in found) == int(0.5 * sum(n for _, n in found) + 0.5), key


def test_llama_as_the_paper_counts():
    base = tiny("llama")
    for _ in range(5):
        names, mlp = chosen(base, seed()), []
        for block in base.places.blocks():
            of = Counter(category(p) for p in block.places if p.name in names)
            assert of["attention"] == 2 and of["norm"] == 1
            mlp.append(of["mlp"])
        assert sorted(mlp) == [1, 2]  # 2 of 3 in half of the blocks, 1 of 3 in the others
        outside = [p for p in base.places if p.depth is None]
        assert outside and all(p.name in names for p in outside)
        assert not any(p.name in chosen(base, seed(), outside=False) for p in outside)


def test_other_ways_and_shares():
    base = tiny("llama")
    blocks = base.places.blocks()
    inside = [p.name for b in blocks for p in b.places]
    by_layer = chosen(base, seed(), by="layer", outside=False)
    assert sorted(len([p for p in b.places if p.name in by_layer]) for b in blocks) == [0, len(blocks[0].places)]
    for share in (0.25, 0.5, 1.0):
        assert len(chosen(base, seed(), by="model", share=share, outside=False)) == int(share * len(inside) + 0.5)
    assert chosen(base, 1, share=1.0) == {p.name for p in base.places}


def test_draws_differ_by_seed_round_and_number_and_repeat():
    base, s = tiny("llama"), seed()
    assert chosen(base, s) == chosen(base, s)
    for other in (dict(s=s + 1), dict(s=s, round=1), dict(s=s, draw=1)):
        different = [chosen(base, **{**dict(s=s), **other, "outside": False}) != chosen(base, s, outside=False)]
        different += [
            chosen(base, **{**other, "s": other["s"] + k, "outside": False}) != chosen(base, s + k, outside=False)
            for k in (10, 20)
        ]
        assert any(different)
    seen = Counter(n for k in range(200) for n in chosen(base, s + k, outside=False))
    ps = [p.name for b in base.places.blocks() for p in b.places]
    assert all(55 < seen[n] < 145 for n in ps), "some tensors are drawn more often than half of the time"


@pytest.mark.parametrize("name, options", variants("select"))
@pytest.mark.parametrize("arch", ["llama", "gpt2", "llama_tied"])
def test_the_update_is_full_fine_tunings_times_the_mask(name, options, arch):
    """One step of SGD; and what is not selected is the base, bit for bit."""
    base, whole, ce = tiny(arch), tokens(4), parts.build("objectives.sft.cross_entropy")
    before = {n: p.detach().clone() for n, p in base.parameters()}
    full, _ = gradients(live(base), ce, whole, 4)
    if "of" in options:
        pytest.skip("it reads what another step left")
    it = live(base, {name: options} if options else name)
    if any(part.state or part.before_step or part.reselect for part in it.parts):
        pytest.skip("it keeps packed entries of its own, tested beside it")
    if any(p.dense is not None for p in it.params.values()):
        return  # entries, not tensors: their mask is tested in tests/methods/select
    part, _ = gradients(it, ce, whole, 2)
    opt = parts.build({"optim.sgd": {"lr": 0.1}})
    stepper = opt.build(list(it.params.values()), None)
    for group in stepper.param_groups:
        group["lr"] = 0.1
    for n, p in it.params.items():
        p.tensor.grad = part[n]
    stepper.step()
    for n, p in base.parameters():
        assert n in it.params or torch.equal(p, before[n])
        mask = float(n in it.params)
        assert torch.allclose(p, before[n] - 0.1 * mask * full[n], atol=1e-6)
        assert p.requires_grad == (n in it.params)
    delta = it.delta()
    assert set(delta.changes) == {n for n in it.params if not torch.equal(before[n], it.params[n].tensor)}
    base.reset()
    assert all(torch.equal(p, before[n]) for n, p in base.parameters())


def test_only_and_freeze():
    base = tiny("llama")
    names = lambda **o: set(live(base, {"select.full": o}).params)
    everything = names()
    assert everything == {n for n, _ in base.parameters()}
    assert names(only=["q"]) == {n for n in everything if "q_proj" in n} and names(freeze=["q"]) == everything - names(
        only=["q"]
    )
    with pytest.raises(UserError, match=r"select\.full\.only"):
        names(only=["qq"])


# ---- merges ------------------------------------------------------------------------------------------------------------------


def change_on(base, kind="dense", only=None):
    r, made = rng(), {}
    for n, p in base.parameters():
        if only and not only(n):
            continue
        d = 0.1 * torch.randn(p.shape, generator=r)
        if kind == "low" and p.dim() == 2:
            made[n] = LowRank(0.1 * torch.randn(2, p.shape[1], generator=r), torch.randn(p.shape[0], 2, generator=r), scale=1.5)
        else:
            made[n] = Replace(p.detach() + d) if kind == "replace" else Dense(d)
    return Delta(made, base=dict(base.sha256))


def tuned(base, delta):
    """Tensors of base + delta; the base is left as it was."""
    return {
        n: delta.change(n).apply(p.detach()).clone() if n in delta.changes else p.detach().clone() for n, p in base.parameters()
    }


def same(a, b, atol=1e-6):
    return all(torch.allclose(a[n], b[n], atol=atol) for n in a)


KINDS = ["dense", "low", "replace"]
SHAPES = [
    p for p in variants("merge") if hasattr(parts.get(p.values[0]), "scale_delta")
]  # the rest: tests/methods/test_merge.py


@pytest.mark.parametrize("name, options", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_speaks_deltas_of_one_base(name, options, kind):
    base, part = tiny("llama"), parts.build({name: options} if options else name)
    a, b = change_on(base, kind), change_on(base, kind)
    before = {n: p.detach().clone() for n, p in base.parameters()}
    merged = part.merge(base, [a, b])
    assert all(torch.equal(p, before[n]) for n, p in base.parameters()) and merged.base == a.base
    assert same(tuned(base, merged), tuned(base, part.merge(base, [b, a])), 1e-5)  # with even weights order is nothing
    base.apply(merged)
    assert same(dict(base.parameters()), tuned(SimpleNamespace(parameters=lambda: before.items()), merged))


@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_a_weighted_sum(kind):
    base, a, b = tiny("llama"), None, None
    a, b, w = change_on(base, kind), change_on(base, kind), [random.random() + 0.1, random.random() + 0.1]
    linear = lambda *deltas, **o: tuned(base, parts.build({"merge.linear": o}).merge(base, list(deltas)))
    W, A, B = {n: p.detach() for n, p in base.parameters()}, tuned(base, a), tuned(base, b)
    assert same(linear(a), A, 0) and same(linear(a, a), A, 1e-5)
    for scale in (1.0, 0.6):
        sum_, mean = ({n: W[n] + scale * sum(x * (t[n] - W[n]) for x, t in zip(v, (A, B), strict=True)) for n in W}
                      for v in (w, [x / sum(w) for x in w]))  # fmt: skip
        assert same(linear(a, b, weights=w, normalise=False, scale=scale), sum_, 1e-5) and same(
            linear(a, b, weights=w, scale=scale), mean, 1e-5
        )
    with pytest.raises(UserError, match="give as many"):
        linear(a, b, weights=[1.0])
    with pytest.raises(UserError, match="sum to 0"):
        linear(a, b, weights=[1.0, -1.0])


@pytest.mark.parametrize("name, options", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dial_ends_at_what_was_trained(name, options, kind):
    base, part = tiny("llama"), parts.build({name: options} if options else name)
    d = change_on(base, kind)
    assert same(tuned(base, part.scale_delta(d, 1.0, base.places)), tuned(base, d), 0)
    if name == "merge.linear":
        assert same(tuned(base, part.scale_delta(d, 0.0, base.places)), {n: p.detach() for n, p in base.parameters()}, 0)
        W, T = dict(base.parameters()), tuned(base, d)
        assert same(tuned(base, part.scale_delta(d, 0.3, base.places)), {n: W[n] + 0.3 * (T[n] - W[n]) for n in W}, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama", "t5", "llama_tied"])
def test_lines_by_its_formula(kind, arch):
    base, d = tiny(arch), None
    d = change_on(base, kind)
    alpha, beta = random.random(), random.random()
    lines = lambda **o: tuned(base, parts.build({"merge.lines": o}).merge(base, [d]))
    W, T = {n: p.detach() for n, p in base.parameters()}, tuned(base, d)
    assert same(lines(alpha=1.0, beta=0.0), T, 0)  # no edit, bit for bit
    assert same(lines(alpha=0.0, beta=0.0), W, 0)
    assert same(lines(alpha=alpha, beta=0.0), tuned(base, parts.build("merge.linear").scale_delta(d, alpha)), 1e-6)  # uniform
    got, default = lines(alpha=alpha, beta=beta), lines(alpha=alpha)
    stacks = dict(MODELS[arch].blocks)
    for n in W:
        place = base.places.parameters(tied=True)[n][0]
        L = stacks.get(place.stack)
        at = 0.0 if place.where == "before" else 1.0 if place.depth is None else place.depth / (L - 1)
        assert torch.allclose(got[n], W[n] + (alpha + beta * at) * (T[n] - W[n]), atol=1e-5), (n, at)
        if at == 1:
            assert torch.allclose(default[n], T[n], atol=1e-6)  # alpha + beta = 1: the last block is as trained


def test_lines_wraps_a_merge_and_edits_of_disjoint_layers_commute():
    base = tiny("llama")
    a, b = change_on(base), change_on(base)
    build = lambda spec: parts.build(spec).merge
    inner = build({"merge.linear": {"weights": [0.3, 0.9], "normalise": False}})(base, [a, b])
    outer = build({"merge.lines": {"alpha": 0.4, "of": {"merge.linear": {"weights": [0.3, 0.9], "normalise": False}}}})(
        base, [a, b]
    )
    assert same(tuned(base, outer), tuned(base, build({"merge.lines": {"alpha": 0.4}})(base, [inner])))
    first, last = change_on(base, only=lambda n: "layers.0." in n), change_on(base, only=lambda n: "layers.1." in n)
    lines = lambda d: build({"merge.lines": {"alpha": 0.2, "beta": 0.5}})(base, [d])
    together = tuned(base, lines(first + last))
    assert same(together, tuned(base, lines(first) + lines(last)), 1e-6) and same(
        together, tuned(base, lines(last) + lines(first)), 1e-6
    )


# ---- intruder dimensions ----------------------------------------------------------------------------------------------------


def base_with(values):
    """A base whose q matrix has the given singular values."""
    base = tiny("llama")
    q = dict(base.parameters())["lm/model.layers.0.self_attn.q_proj.weight"]
    U, V = (torch.linalg.qr(torch.randn(32, 32, generator=rng(), dtype=torch.float64))[0] for _ in range(2))
    q.data = ((U * torch.tensor(values).double()) @ V.T).float()
    return base, "lm/model.layers.0.self_attn.q_proj.weight", U.float(), V.float()


def diagnose(base, delta, **options):
    found = parts.build({"diagnose.intruder_dimensions": options}).diagnose(SimpleNamespace(base=base, delta=delta))
    return found, found["rows"][0] if found["rows"] else None


def test_no_change_and_rotation_bring_no_intruder():
    base, q, _, _ = base_with([10 - 0.2 * i for i in range(32)])
    W0 = dict(base.parameters())[q].detach()
    found, row = diagnose(base, Delta({q: Replace(W0.clone())}))
    assert found["intruders"] == 0 and min(row["overlap"]) > 0.999 and row["effective_rank"] == 0 and row["relative_norm"] == 0
    R = torch.linalg.qr(torch.randn(32, 32, generator=rng()))[0]
    found, row = diagnose(base, Delta({q: Replace(W0 @ R)}))
    assert found["intruders"] == 0 and min(row["overlap"]) > 0.99  # turning the inputs leaves the left vectors


def test_one_new_direction_is_one_intruder():
    """W0 spans 16 of 32 directions; s u v^T with u outside of them and s above all stands first, and its overlap is 0."""
    base, q, U, V = base_with([10 - 0.3 * i for i in range(16)] + [0.0] * 16)
    W0 = dict(base.parameters())[q].detach()
    mixed = (U @ torch.ones(32)) / 32**0.5  # equally near to every base direction: overlap 1 / sqrt(32)
    for s in (50.0, 9.85):
        W = W0 + s * torch.outer(mixed, V[:, 20])
        found, row = diagnose(base, Delta({q: Replace(W)}), k=4)
        if s == 50.0:
            assert found["intruders"] == 1 and row["ranks"] == [0] and row["singular_values"][0] == pytest.approx(50, rel=0.05)
            assert row["overlap"][0] < 0.5 and min(row["overlap"][1:]) > 0.5
            assert row["effective_rank"] == pytest.approx(1, abs=1e-2) and row["relative_norm"] == pytest.approx(
                50 / float(W0.norm()), rel=1e-3
            )
        m, S = overlaps(W0.double(), W.double(), 4)
        want_U, want_S, _ = torch.linalg.svd(W.double())
        U0 = torch.linalg.svd(W0.double())[0]
        assert torch.allclose(m, (want_U[:, :4].T @ U0).abs().max(1).values, atol=1e-6) and torch.allclose(S, want_S[:4])
    assert diagnose(base, Delta({q: Replace(W0 + 50 * torch.outer(mixed, V[:, 20]))}), k=4, eps=0.01)[0]["intruders"] == 0


def test_lora_brings_them_and_only_matrices_are_read():
    it = shake(live(tiny("gpt2"), {"adapters.lora": {"rank": 1}}), 3.0)
    delta = it.delta()
    it.close()
    found, row = diagnose(it.base, delta, k=3)
    assert found["matrices"] == len(delta.changes) and found["intruders"] >= len(delta.changes) // 2
    assert row["effective_rank"] == pytest.approx(1, abs=0.01)  # also where GPT-2 stores its matrices the other way round
    fast = replace(delta, changes={n: c for n, c in delta.changes.items() if "c_attn" in n})
    assert diagnose(it.base, fast)[0]["matrices"] == 2


def test_effective_rank():
    assert effective_rank(torch.ones(7)) == pytest.approx(7) and effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0 and effective_rank(torch.tensor([1.0, 1.0, 0])) == pytest.approx(2)
    assert context(tiny("llama")).batch == 8
