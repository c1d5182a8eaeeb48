"""Objectives and regularizers: invariant to any split, and equal to their formula computed from plain logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from generators import LCM, unet
from properties.table import variants
from tiny import (
    BATCHES,
    at_work,
    gradients,
    live,
    pairs,
    plain_label,
    plain_logp,
    policy,
    rng,
    rollout,
    seeing,
    shake,
    tiny,
    tokens,
    views,
)

from temperament import parts, protocols
from temperament.nn.batch import Tokens
from temperament.protocols import Progress

MODEL = "llama"
# Two read what another player left (test_ppo.py, test_noise_mask.py), others paint: they have tests of their own.
APART = ("objectives.policy.value", "objectives.policy.noise_mask", "objectives.diffusion")
OBJECTIVES = [p for p in variants("objectives") if not p.values[0].startswith(APART)]


@pytest.fixture(scope="module")
def it():
    """A live model away from its base: a random adapter on a random model."""
    return shake(live(tiny(MODEL), {"adapters.lora": {"rank": 3}}))


WORDED = ("objectives.contrastive", "objectives.classify.class_texts")  # of pictures and captions


def beside(part):
    """The objective a part is tried with: itself, or for a regularizer one of its kind of rows."""
    if type(part).part_name.startswith("objectives"):
        return part
    if "image" not in part.part_modalities:
        return parts.build("objectives.sft.cross_entropy")
    texts = {"objectives.classify.class_texts": {"of": "data.sprites"}}
    worded = type(part).part_name == "regularizers.feature_consistency"
    return parts.build(texts if worded else "objectives.classify.cross_entropy")


def subject(it, part):
    """What is trained on such batches: a language model, a policy, a generator, or a model that sees pictures."""
    if getattr(part, "batch", ())[:1] == ("Images",):
        if type(part).part_name.split(".")[1] in ("diffusion", "consistency"):
            return shake(live(unet(LCM, side=16)), 0.02)
        it = shake(live(seeing("clip" if type(part).part_name.startswith(WORDED) else "vit")))
        for version in {*getattr(part, "needs", ())} - {"base", "start"}:
            it.mark(version)
        return shake(it)
    return shake(live(policy())) if getattr(part, "batch", ())[:1] == ("Steps",) else it


def close(a: dict, b: dict, rtol=1e-5) -> bool:
    size = math.sqrt(sum(float(v.norm()) ** 2 for v in a.values()))
    return math.sqrt(sum(float((a[n] - b[n]).norm()) ** 2 for n in a)) <= rtol * size + 1e-9 and size > 0


@pytest.mark.parametrize("name, options", [*OBJECTIVES, *variants("regularizers")])
def test_any_split_gives_the_same_loss_and_gradient(it, name, options):
    part = parts.build({name: options})
    objective = beside(part)
    it = subject(it, objective)
    whole = BATCHES[objective.batch[0]](8)
    regularizers = [] if part is objective else [at_work(part, it, whole)]
    g1, got1 = gradients(it, objective, whole, 8, regularizers)
    for micro in (1, 3):
        g, got = gradients(it, objective, whole, micro, regularizers)
        assert close(g1, g) and got.terms.keys() == got1.terms.keys()
        assert all(got.terms[n] == pytest.approx(v, rel=1e-4, abs=1e-6) for n, v in got1.terms.items())
        assert got.loss == pytest.approx(got1.loss, rel=1e-4, abs=1e-6) and got.counts == got1.counts
    order = torch.randperm(8, generator=rng())
    assert close(g1, gradients(it, objective, whole.select(order), 4, regularizers)[0])


@pytest.mark.parametrize("name, options", [*OBJECTIVES, *variants("regularizers")])
def test_counts_are_known_before_and_add_up(it, name, options):
    part = parts.build({name: options})
    if getattr(part, "per", "") == "step":
        pytest.skip("counted once a step")
    if hasattr(part, "statistics"):
        pytest.skip("coupled: it has no sums of a micro-batch's own")
    it, whole = subject(it, beside(part)), BATCHES[beside(part).batch[0]](7)
    if hasattr(part, "prepare"):
        whole = part.prepare(whole, views(it))
    counts, sums = part.counts(whole), {}
    for micro in whole.split(3):
        for n, term in part.loss(micro, views(it)).items():
            assert term.value.dim() == 0
            sums[n] = sums.get(n, 0.0) + term.count
    assert sums.keys() == counts.keys()
    if options.get("per") != "constant":  # (a constant count is not a sum over rows)
        assert all(sums[n] == pytest.approx(counts[n], rel=1e-5) for n in counts)


def test_rows_without_weight_add_nothing(it):
    part, whole = parts.build("objectives.sft.cross_entropy"), tokens(4)
    blank = tokens(2)
    blank.weights.zero_()
    cat = lambda f: torch.cat([getattr(whole, f), getattr(blank, f)])
    both = Tokens(cat("ids"), cat("weights"), cat("segments"), cat("examples"))
    for options in ({}, {"per": "example"}):
        part = parts.build({"objectives.sft.cross_entropy": options})
        assert close(gradients(it, part, whole, 4)[0], gradients(it, part, both, 1)[0])  # an empty micro-batch, too
    nothing, got = gradients(it, part, blank, 2)
    assert all(g.abs().max() == 0 for g in nothing.values()) and got.loss == 0


# ---- supervised -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_cross_entropy_by_brute_force(it, packed):
    whole = tokens(6, 12, packed=packed)
    logp, w = plain_label(it.model, whole), whole.weights
    logp = logp.detach()
    per_token = float(-(logp * w).sum() / w.sum())
    _, got = gradients(it, parts.build("objectives.sft.cross_entropy"), whole, 2)
    assert got.loss == pytest.approx(per_token, rel=1e-5)
    inside = [(i, whole.segments[i] == s) for i in range(6) for s in range(int(whole.segments[i].max()) + 1)]
    means = [float(-(logp[i] * w[i])[own].sum() / w[i][own].sum()) for i, own in inside if w[i][own].sum() > 0]
    _, got = gradients(it, parts.build({"objectives.sft.cross_entropy": {"per": "example"}}), whole, 2)
    assert got.loss == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_cross_entropy_is_the_loss_and_gradient_of_transformers():
    base = tiny("qwen2")
    it, whole = live(base), tokens(5)
    whole.weights = (whole.weights > 0).float()
    labels = torch.where(whole.weights > 0, whole.ids, -100)
    want = base.model(input_ids=whole.ids, attention_mask=whole.mask.long(), labels=labels).loss
    theirs = torch.autograd.grad(want, [p.tensor for p in it.params.values()])
    ours, got = gradients(it, parts.build("objectives.sft.cross_entropy"), whole, 2)
    assert got.loss == pytest.approx(float(want.detach()), rel=1e-5)
    assert close(dict(zip(it.params, theirs, strict=True)), ours)


def test_behaviour_cloning_is_half_the_square():
    it, part, batch = shake(live(policy())), parts.build("objectives.sft.behaviour_cloning"), BATCHES["Steps"](4)
    got, out = gradients(it, part, batch, 2)
    w = batch.weights
    loss = ((it.model(batch.observations).mean - batch.decisions).square().sum(-1) / 2 * w).sum() / w.sum()
    names = [n for n in it.params if "log_std" not in n]
    theirs = torch.autograd.grad(loss, [it.params[n].tensor for n in names])
    assert out.loss == pytest.approx(float(loss.detach()), rel=1e-5) and close(
        dict(zip(names, theirs, strict=True)), {n: got[n] for n in names}
    )
    assert got["policy/log_std"].abs().max() == 0


# ---- preferences ------------------------------------------------------------------------------------------------------------


def logps(model, batch):
    return [(plain_label(model, t) * t.weights).sum(1) for t in (batch.chosen, batch.rejected)]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reference", ["start", "base"])
def test_dpo_by_its_formula(it, smoothing, reference):
    batch, beta = pairs(4), 0.4
    part = parts.build({"objectives.preference.dpo": {"beta": beta, "label_smoothing": smoothing, "reference": reference}})
    ours, got = gradients(it, part, batch, 2)
    with torch.no_grad(), it.at("base"):
        ref_w, ref_l = logps(it.model, batch)
    pi_w, pi_l = logps(it.model, batch)
    m = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    want = (-(1 - smoothing) * F.logsigmoid(m) - smoothing * F.logsigmoid(-m)).mean()
    assert got.loss == pytest.approx(float(want.detach()), rel=1e-4)
    assert got.terms["margin"] == pytest.approx(float(m.mean()), rel=1e-3, abs=1e-5)
    assert got.terms["accuracy"] == pytest.approx(float((m > 0).float().mean()))
    theirs = torch.autograd.grad(want, [p.tensor for p in it.params.values()])
    assert close(dict(zip(it.params, theirs, strict=True)), ours, 1e-4)


def test_dpo_at_its_reference_is_log_two():
    it = live(tiny(MODEL), {"adapters.lora": {"rank": 2}})
    _, got = gradients(it, parts.build("objectives.preference.dpo"), pairs(3), 3)
    assert got.loss == pytest.approx(math.log(2), rel=1e-5) and got.terms["margin"] == pytest.approx(0, abs=1e-5)


def test_ipo_by_its_formula(it):
    batch, beta = pairs(4), 0.3
    ours, got = gradients(it, parts.build({"objectives.preference.ipo": {"beta": beta, "reference": "base"}}), batch, 2)
    n_w, n_l = (side.weights.sum(1) for side in (batch.chosen, batch.rejected))
    with torch.no_grad(), it.at("base"):
        ref_w, ref_l = logps(it.model, batch)
    pi_w, pi_l = logps(it.model, batch)
    want = (((pi_w - ref_w) / n_w - (pi_l - ref_l) / n_l - 1 / (2 * beta)) ** 2).mean()
    assert got.loss == pytest.approx(float(want.detach()), rel=1e-4)
    theirs = torch.autograd.grad(want, [p.tensor for p in it.params.values()])
    assert close(dict(zip(it.params, theirs, strict=True)), ours, 1e-4)


# ---- policies
# -----------------------------------------------------------------------------------------------------------------


def grpo_by_hand(it, batch, o, reference):
    """The docstring's formula, one response and one token after the other."""
    logp = plain_label(it.model, batch.tokens)
    w, total, n = batch.tokens.weights, 0.0, 0.0
    kl_total, clipped = 0.0, 0.0
    for i in range(len(batch)):
        mates = batch.rewards[batch.group == batch.group[i]]
        advantage = batch.rewards[i] - mates.mean()
        if o.scale:
            advantage = advantage / (mates.std(unbiased=True) + o.eps)
        on = (w[i] > 0).nonzero()[:, 0]
        for t in on:
            share = 1 / len(on) if o.per == "sequence" else 1.0
            ratio = torch.exp(logp[i, t] - batch.behaviour[i, t])
            cut = torch.clamp(ratio, 1 - o.clip_low, 1 + o.clip_high)
            total = total - share * torch.minimum(ratio * advantage, cut * advantage)
            clipped += share * float(ratio.detach() != cut.detach())
            d = reference[i, t] - logp[i, t]
            kl_total = kl_total + share * (torch.exp(d) - d - 1)
            n += share
    n = {"constant": len(batch) * o.max_new}.get(o.per, n)
    return total / n, kl_total / n, clipped / n


@pytest.mark.parametrize("options", [
    {}, {"scale": False}, {"clip_low": 0.05, "clip_high": 0.5}, {"per": "sequence", "beta": 0.2},
    {"per": "constant", "max_new": 11},
    {"beta": 0.3, "reference": "base"},
], ids=str)  # fmt: skip
def test_grpo_by_brute_force(it, options):
    part, batch = parts.build({"objectives.policy.grpo": options}), rollout(8, 4)
    batch.rewards[4:] = 0.7  # a group whose rewards are all equal teaches nothing
    with torch.no_grad(), it.at("base"):
        reference = plain_label(it.model, batch.tokens)
    policy, kl, clipped = grpo_by_hand(it, batch, part, reference)
    ours, got = gradients(it, part, batch, 3)
    assert got.terms["policy"] == pytest.approx(float(policy), rel=1e-4, abs=1e-5)
    assert got.terms["clipped"] == pytest.approx(clipped, rel=1e-4, abs=1e-6) and 0 < clipped < 1
    assert got.terms["reward"] == pytest.approx(float(batch.rewards.mean()), rel=1e-5)
    want = policy
    if part.beta:
        assert got.terms["kl"] == pytest.approx(float(kl), rel=1e-3) and float(kl) > 0
        want = policy + part.beta * kl
    assert got.loss == pytest.approx(float(want.detach()), rel=1e-3, abs=1e-5)
    theirs = torch.autograd.grad(want, [p.tensor for p in it.params.values()])
    assert close(dict(zip(it.params, theirs, strict=True)), ours, 1e-4)


def test_grpo_on_its_own_policy_is_the_policy_gradient(it):
    """Where the policy has not moved every ratio is 1, nothing is clipped, and the gradient is that of -sum A log pi."""
    batch, part = rollout(6, 3), parts.build({"objectives.policy.grpo": {"scale": False}})
    with torch.no_grad():
        batch.behaviour = plain_label(it.model, batch.tokens)
    ours, got = gradients(it, part, batch, 2)
    mean = torch.stack([batch.rewards[batch.group == g].mean() for g in batch.group])
    want = (
        -((batch.rewards - mean)[:, None] * plain_label(it.model, batch.tokens) * batch.tokens.weights).sum()
        / batch.tokens.weights.sum()
    )
    theirs = torch.autograd.grad(want, [p.tensor for p in it.params.values()])
    assert got.terms["clipped"] == 0 and close(dict(zip(it.params, theirs, strict=True)), ours, 1e-4)


def test_an_advantage_sums_to_nothing_and_has_unit_spread(it):
    batch = parts.build("objectives.policy.grpo").prepare(rollout(8, 4), views(it))
    for g in (0, 1):
        a = batch.advantages[batch.group == g]
        assert float(a.sum()) == pytest.approx(0, abs=1e-4) and float(a.std()) == pytest.approx(1, abs=0.01)


# ---- regularizers
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("kind", ["Tokens", "Pairs", "Rollout"])
def test_kl_by_brute_force(it, direction, kind):
    part, batch = parts.build({"regularizers.kl": {"direction": direction, "weight": 0.6}}), BATCHES[kind](4)
    with torch.no_grad(), it.at("base"):
        refs = [plain_logp(it.model, t) for t in _tokens(batch)]
    total, count = 0.0, 0.0
    for t, ref in zip(_tokens(batch), refs, strict=True):
        pi = plain_logp(it.model, t)
        a, b = (ref, pi) if direction == "forward" else (pi, ref)
        total, count = total + ((a.exp() * (a - b)).sum(-1) * t.weights).sum(), count + t.weights.sum()
    (term,) = part.loss(batch, views(it)).values()
    assert float(term.value) == pytest.approx(float(total), rel=1e-4) and term.weight == 0.6 and term.value > 0
    assert term.count == pytest.approx(float(count), rel=1e-5)


def _tokens(batch):
    return [batch] if isinstance(batch, Tokens) else [v for v in vars(batch).values() if isinstance(v, Tokens)]


@pytest.mark.parametrize("name, options", variants("regularizers"))
def test_a_regularizer_is_nothing_at_its_version(name, options):
    """At no change the penalty is 0 and so is its gradient: it holds, it does not pull."""
    if name == "regularizers.dr_tune":
        pytest.skip("it holds a head, which learns from what the base knows: tested in tests/methods")
    if name == "regularizers.feature_consistency":
        pytest.skip("it compares other looks at the same thing: tested in tests/methods")
    it, part = live(tiny(MODEL), {"adapters.lora": {"rank": 2}}), parts.build({name: options})
    ce = parts.build("objectives.sft.cross_entropy")
    whole = tokens(4)
    without, _ = gradients(it, ce, whole, 4)
    held, got = gradients(it, ce, whole, 4, [part])
    own = [n for n in got.terms if n != "nll"]
    if name == "regularizers.l1":
        return  # it holds weights, of which a LoRA has none, or shrinks new tensors: tested in tests/methods
    assert own and all(abs(got.terms[n]) < 1e-6 for n in own)
    assert close(without, held, 1e-5)


def test_a_weight_of_nothing_is_measured_and_changes_nothing(it):
    ce, whole = parts.build("objectives.sft.cross_entropy"), tokens(4)
    without, plain = gradients(it, ce, whole, 4)
    zero, got = gradients(it, ce, whole, 2, [parts.build({"regularizers.kl": {"weight": 0.0}})])
    assert close(without, zero) and got.loss == pytest.approx(plain.loss, rel=1e-5) and got.terms["kl"] > 0
    faded = {"regularizers.kl": {"weight": {"schedules.linear": {"start": 0.0, "end": 0.8}}}}
    faded = parts.build(faded, protocols.Regularizer)
    assert [parts.at(faded, Progress(k, 5)).weight for k in (0, 2, 4)] == pytest.approx([0.0, 0.4, 0.8])


def test_terms_of_one_name_are_kept_apart(it):
    """Two regularizers of a kind, or one beside an objective with a term of that name."""
    kl = lambda **o: parts.build({"regularizers.kl": o})
    ce, whole = parts.build("objectives.sft.cross_entropy"), tokens(4)
    both, got = gradients(it, ce, whole, 2, [kl(direction="forward", weight=0.5), kl(weight=0.25)])
    one, _ = gradients(it, ce, whole, 4)
    each = [gradients(it, ce, whole, 4, [kl(direction=d, weight=w)])[0] for d, w in (("forward", 0.5), ("reverse", 0.25))]
    assert close({n: each[0][n] + each[1][n] - one[n] for n in one}, both, 1e-4) and len(got.terms) == 3
    grpo, batch = parts.build({"objectives.policy.grpo": {"beta": 0.1}}), rollout(4, 2)
    assert len(gradients(it, grpo, batch, 2, [kl()])[1].terms) == 5
