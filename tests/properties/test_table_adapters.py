"""Linear adapters: off is the base, the start is the base, live is merged, and what is saved is what was trained."""

import pytest
import torch
from models import MODELS
from properties.table import variants
from tiny import context, gradients, live, plain_label, rng, seed, shake, tiny, tokens, views
from torch import nn

from temperament import parts
from temperament.bases.load import Base
from temperament.delta import Delta
from temperament.delta.peft_write import write_peft
from temperament.errors import UserError
from temperament.methods.adapters.lora import LoRAPiece, _Fused
from temperament.nn.context import context as forward_context
from temperament.nn.draws import Address
from temperament.nn.logprobs import label, score
from temperament.nn.pieces import Switch, attach
from temperament.train.live import Live

ADAPTERS = [p for p in variants("adapters") if hasattr(parts.get(p.values[0]), "build")]
FIRST = [p for p in ADAPTERS if p.id.endswith("-0")]  # one variant of each, on every architecture


def run(name: str, base: Base, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return MODELS[name].output(base.model(**inputs)).clone()


def near(a: torch.Tensor, b: torch.Tensor, rtol: float = 2e-5) -> bool:
    return bool((a - b).norm() <= rtol * b.norm())


def linear(base: Base, name: str, options: dict) -> Live:
    """The adapter on the base; those that are no change of a weight have tests of their own."""
    try:
        it = live(base, {name: options})
    except UserError as refused:
        pytest.skip(f"not for this architecture: {refused}")
    if not any(part.pieces for part in it.parts):
        pytest.skip("not a linear adapter")
    return it


@pytest.mark.parametrize("name, options", FIRST)
@pytest.mark.parametrize("arch", MODELS)
def test_off_start_live_and_merged(arch, name, options):
    if MODELS[arch].needs != "transformers":
        pytest.importorskip(MODELS[arch].needs)
    base, inputs = tiny(arch), MODELS[arch].inputs(seed())
    base.model.requires_grad_(False)  # (torch's own attention rounds differently where weights require a gradient)
    pure = run(arch, base, inputs)
    state = {n: p.detach().clone() for n, p in base.parameters()}
    it = linear(base, name, options)
    assert torch.equal(run(arch, base, inputs), pure) or near(run(arch, base, inputs), pure, 1e-6)  # it starts at no change
    shake(it, 0.2)
    moved = run(arch, base, inputs)
    assert not near(moved, pure, 1e-3)
    with it.at("base"):
        assert torch.equal(run(arch, base, inputs), pure)  # off is the base, to the bit
    with it.at("start"):
        assert torch.equal(run(arch, base, inputs), pure)
    delta = it.delta()
    it.close()
    assert all(torch.equal(p, state[n]) for n, p in base.parameters()) and torch.equal(run(arch, base, inputs), pure)
    assert not any("_pieces" in m.__dict__ or "forward" in m.__dict__ for m in base.model.modules())
    base.apply(delta)
    assert near(run(arch, base, inputs), moved)
    base.reset()
    assert torch.equal(run(arch, base, inputs), pure)


@pytest.mark.parametrize("name, options", ADAPTERS)
def test_a_delta_goes_to_disk_and_back(name, options, tmp_path):
    base = tiny("gpt2")
    delta = shake(linear(base, name, options)).delta()
    delta.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d")
    assert again.digest == delta.digest and again.base == delta.base and again.names == delta.names
    known = dict(base.parameters())
    for n in delta.names:
        assert torch.equal(again.change(n).apply(known[n].detach()), delta.change(n).apply(known[n].detach()))


@pytest.mark.parametrize("name, options", [p for p in ADAPTERS if p.id.startswith("adapters.lora")])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "opt"])
def test_peft_loads_what_we_wrote(name, options, arch, tmp_path):
    peft = pytest.importorskip("peft")
    base, inputs = tiny(arch), MODELS[arch].inputs(seed())
    it = shake(live(base, {name: options}))
    want, delta = run(arch, base, inputs), it.delta()
    it.close()
    write_peft(delta, tmp_path / "a", base=base.model, task_type="CAUSAL_LM")
    assert Delta.load(tmp_path / "a").digest  # and so do we
    theirs = peft.PeftModel.from_pretrained(base.model, tmp_path / "a")
    with torch.no_grad():
        assert near(theirs(**inputs).logits, want)


# ---- LoRA's fused node against plain autograd
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_node_is_plain_autograd(bias):
    r = rng()
    new = lambda *s: torch.randn(*s, generator=r, dtype=torch.float64).requires_grad_(True)
    x, A, B = new(2, 3, 5), new(2, 5), new(4, 2)
    W, b = new(4, 5).detach(), (new(4).detach() if bias else None)
    fused = lambda x, A, B: _Fused.apply(x, W, b, A, B, 1.7)
    plain = lambda x, A, B: nn.functional.linear(x, W, b) + 1.7 * (x @ A.T) @ B.T
    assert torch.allclose(fused(x, A, B), plain(x, A, B), atol=1e-12)
    assert torch.autograd.gradcheck(fused, (x, A, B))
    g = torch.randn(2, 3, 4, generator=r, dtype=torch.float64)
    for mine, theirs in zip(*(torch.autograd.grad(f(x, A, B), (x, A, B), g) for f in (fused, plain)), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


def conv1d(inside: int, outside: int):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outside, inside)


MAPS = {
    "linear": (lambda: nn.Linear(6, 5), "linear", (6,), lambda r: torch.randn(3, 4, 6, generator=r)),
    "without bias": (lambda: nn.Linear(6, 5, bias=False), "linear", (6,), lambda r: torch.randn(3, 6, generator=r)),
    "conv1d": (lambda: conv1d(6, 5), "conv1d", (6,), lambda r: torch.randn(3, 4, 6, generator=r)),
    "conv": (
        lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1),
        "linear",
        (3, 3, 3),
        lambda r: torch.randn(2, 3, 7, 7, generator=r),
    ),
    "embedding": (lambda: nn.Embedding(9, 5), "embedding", (9,), lambda r: torch.randint(0, 9, (3, 4), generator=r)),
}


@pytest.mark.parametrize("kind", MAPS)
def test_value_and_gradients_are_those_of_the_merged_weight(kind):
    make, layout, inside, feed = MAPS[kind]
    r, module = rng(), make()
    A, B = torch.randn(2, *inside, generator=r), torch.randn(5, 2, generator=r)
    piece, x = LoRAPiece(A, B, 0.8, layout, 0.0, "here"), feed(r)
    x = x.requires_grad_(True) if x.is_floating_point() else x
    module.requires_grad_(False)
    attach(module, piece, Switch())
    y = module(x)
    g = torch.randn(y.shape, generator=r)
    wanted = [piece.A, piece.B, *([x] if x.requires_grad else [])]
    mine = torch.autograd.grad(y, wanted, g)
    merged = module.weight + piece.change().delta(module.weight)
    z = torch.func.functional_call(
        make(), {"weight": merged} | ({"bias": module.bias} if getattr(module, "bias", None) is not None else {}), (x,)
    )
    assert torch.allclose(y, z, atol=1e-5)
    for a, b in zip(mine, torch.autograd.grad(z, wanted, g), strict=True):
        assert torch.allclose(a, b, atol=1e-4), kind


def test_a_trained_weight_under_an_adapter_gets_its_gradient():
    """[select.full, adapters.lora] on one matrix: both learn, and the change left behind is both."""
    base = tiny("llama")
    it, whole = shake(live(base, "select.full", {"adapters.lora": {"rank": 2}}), 0.05), tokens(4)
    g, _ = gradients(it, parts.build("objectives.sft.cross_entropy"), whole, 2)
    q = "lm/model.layers.0.self_attn.q_proj.weight"
    loss = -(plain_label(base.model, whole) * whole.weights).sum() / whole.weights.sum()
    # by hand: gradient of the plain forward, LoRA in its unfused form
    W = it.params[q].tensor
    (theirs,) = torch.autograd.grad(loss, [W])
    assert float(g[q].norm()) > 0 and near(g[q], theirs, 1e-4)
    eps = torch.zeros_like(W)
    eps[1, 2] = 1e-2
    with torch.no_grad():
        at = lambda s: float(-(plain_label(_with(base, W, s * eps), whole) * whole.weights).sum() / whole.weights.sum())
        assert (at(1) - at(-1)) / 2e-2 == pytest.approx(float(g[q][1, 2]), rel=0.05, abs=1e-4)
    W.data = base._was
    inputs = MODELS["llama"].inputs()
    moved, delta = run("llama", base, inputs), it.delta()
    it.close()
    base.reset()
    base.apply(delta)
    assert near(run("llama", base, inputs), moved)


def _with(base, W, by):
    base.__dict__.setdefault("_was", W.detach().clone())
    W.data = base._was + by
    return base.model


@pytest.mark.parametrize("stack", [
    ["select.half", {"adapters.lora": {"rank": 2}}],
    [{"adapters.lora": {"rank": 2}}, {"adapters.lora": {"rank": 3, "targets": ["q", "v"]}}],
    [{"select.full": {"only": ["norm"]}}, {"adapters.lora": {"rank": 2, "targets": ["mlp"]}}],
], ids=["half+lora", "lora+lora", "norms+lora"])  # fmt: skip
@pytest.mark.parametrize("arch", ["llama", "gpt2", "llama_tied"])
def test_a_stack_of_trainables_leaves_all_it_changed(stack, arch):
    base, inputs = tiny(arch), MODELS[arch].inputs(seed())
    pure, ctx = run(arch, base, inputs), context(base)
    built = [parts.build(t).build(base, ctx) for t in stack]
    many = sum(len(t.params) for t in built)
    it = shake(Live(base, built), 0.05)
    assert len(it.params) == many, "a tensor is lost to another of its name"
    moved = run(arch, base, inputs)
    with it.at("base"):
        assert torch.equal(run(arch, base, inputs), pure)
    it.mark("here")
    shake(it, 0.05)
    with it.at("here"):
        assert torch.equal(run(arch, base, inputs), moved)
    moved, delta = run(arch, base, inputs), it.delta()
    it.close()
    base.reset()
    assert torch.equal(run(arch, base, inputs), pure)
    base.apply(delta)
    assert near(run(arch, base, inputs), moved)


@pytest.mark.parametrize("targets", [["embed"], ["head"], ["all"], ["all-linear", "head"]], ids=str)
@pytest.mark.parametrize("arch", ["llama", "llama_tied", "gpt2"])
def test_a_tied_embedding_is_adapted_rightly_or_refused(arch, targets):
    base, inputs = tiny(arch), MODELS[arch].inputs(seed())
    try:
        it = shake(live(base, {"adapters.lora": {"rank": 2, "targets": targets}}), 0.2)
    except UserError as refused:
        assert "tied" in str(refused) or "no place" in str(refused), refused
        return
    moved, delta = run(arch, base, inputs), it.delta()
    it.close()
    base.apply(delta)
    assert near(run(arch, base, inputs), moved)


# ---- dropout, scale, ranks
# ------------------------------------------------------------------------------------------------------


def test_dropout_is_addressed_by_example_and_position():
    """The same masks in one batch, row by row, in another order, packed or padded; another step or seed draws others."""
    it = shake(live(tiny("llama"), {"adapters.lora": {"rank": 2, "dropout": 0.4}}), 0.3)
    whole = tokens(6)

    def at(t, step=0, s=5):
        with torch.no_grad(), forward_context(draws=Address(s, "forward", step, torch.empty(0, dtype=torch.long))):
            return score(it.model, t, label())["label"]

    one = at(whole)
    rows = torch.cat([at(r) for r in whole.split(1)])
    order = torch.randperm(6, generator=rng())
    assert torch.allclose(one, rows, atol=1e-5) and torch.allclose(one[order], at(whole.select(order)), atol=1e-5)
    with torch.no_grad():
        quiet = score(it.model, whole, label())["label"]
    assert not torch.allclose(one, quiet, atol=1e-3)  # no draws outside of a training step
    assert not torch.allclose(one, at(whole, step=1), atol=1e-3) and not torch.allclose(one, at(whole, s=6), atol=1e-3)
    part = parts.build("objectives.sft.cross_entropy")
    a, b = gradients(it, part, whole, 8)[0], gradients(it, part, whole, 1)[0]
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)


def test_the_scale_is_alpha_over_rank():
    piece = lambda **o: parts.build({"adapters.lora": o}).scale
    assert piece(rank=8) == 2.0 and piece(rank=8, alpha=4.0) == 0.5
    assert piece(rank=9, alpha=6.0, rank_stabilised=True) == pytest.approx(2.0)


def test_lora_starts_by_place_and_seed_and_b_has_its_own_rate():
    base = tiny("llama")
    make = lambda **o: live(base, {"adapters.lora": {"rank": 2, **o}}, seed=o.pop("seed", 3))
    one, two, other = make(), make(targets=["q"]), live(base, {"adapters.lora": {"rank": 2}}, seed=4)
    assert all(torch.equal(two.params[n].tensor, one.params[n].tensor) for n in two.params)  # whatever else is adapted
    q = "lm/model.layers.0.self_attn.q_proj.weight"
    assert (
        not torch.equal(one.params[q + ":A"].tensor, other.params[q + ":A"].tensor)
        and one.params[q + ":B"].tensor.abs().max() == 0
    )
    assert not torch.equal(one.params[q + ":A"].tensor, one.params[q.replace("layers.0", "layers.1") + ":A"].tensor)
    factors = {p.role: p.lr_factor for p in make(lr_factor_B=16.0).params.values()}
    assert factors == {"A": 1.0, "B": 16.0}
    assert views(one).live is one


def test_a_mistyped_target_is_named():
    with pytest.raises(UserError, match=r"adapters.lora.targets is 'q_porj'.*q_proj"):
        live(tiny("llama"), {"adapters.lora": {"targets": ["q_porj"]}})
