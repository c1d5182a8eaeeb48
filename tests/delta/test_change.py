"""Every kind of change, one line in the table: the same properties hold for all."""

import pytest
import torch

from temperament.delta import (
    Change,
    Dense,
    Kronecker,
    LowRank,
    Masked,
    Multiplied,
    Renormalised,
    Replace,
    Rows,
    Sparse,
    Sum,
    Ternary,
    Transformed,
)
from temperament.delta.combined import add
from temperament.errors import UserError

OUT, IN = 6, 10


def r(*shape):
    return torch.randn(*shape)


def sparse(new=False, shape=(OUT, IN)):
    at = torch.randperm(OUT * IN)[:7].to(torch.int32)
    return Sparse(at, r(7), shape, new=new)


def lora(scale=0.7, rank=2, layout="linear"):
    shape = (IN, OUT) if layout == "linear" else (OUT, IN)
    return LowRank(r(rank, shape[0]), r(shape[1], rank), layout=layout, scale=scale)


MAKE = {
    "dense": lambda: Dense(r(OUT, IN)),
    "dense.half": lambda: Dense(r(OUT, IN).bfloat16()),
    "sparse": sparse,
    "sparse.new": lambda: sparse(new=True),
    "low_rank": lora,
    "low_rank.conv1d": lambda: lora(layout="conv1d"),
    "low_rank.embedding": lambda: lora(layout="embedding"),
    "kronecker": lambda: Kronecker(r(2, 5), r(3, 2), scale=0.3),
    "ternary": lambda: Ternary.pack(torch.randint(-1, 2, (OUT, IN)), scale=0.02),
    "replace": lambda: Replace(r(OUT, IN)),
    "multiplied.rows": lambda: Multiplied(r(OUT, 1)),
    "multiplied.columns": lambda: Multiplied(r(1, IN)),
    "multiplied": lambda: Multiplied(r(OUT, IN)),
    "transformed": lambda: Transformed(left=r(OUT, OUT), right=r(IN, IN)),
    "transformed.right": lambda: Transformed(right=r(IN, IN)),
    "renormalised": lambda: Renormalised(lora(), r(OUT).abs()),
    "renormalised.conv1d": lambda: Renormalised(lora(layout="conv1d"), r(IN).abs(), layout="conv1d"),
    "sum": lambda: Sum((lora(), sparse(), Replace(r(OUT, IN)))),
    "masked": lambda: Masked(lora(), r(OUT, IN) > 0),
    "masked.replace": lambda: Masked(Replace(r(OUT, IN)), r(OUT, 1) > 0),
    "masked.soft": lambda: Masked(Multiplied(r(OUT, IN)), torch.rand(1, IN)),
    "rows": lambda: Rows(LowRank(r(2, IN), r(3, 2)), torch.tensor([4, 0, 2]), (OUT, IN)),
    "rows.span": lambda: Rows.span(Replace(r(2, IN)), 3, 5, (OUT, IN)),
    "nested": lambda: Sum((Masked(Sum((lora(), sparse())), r(OUT, 1) > 0), Dense(r(OUT, IN)))).scaled(0.4),
}
every = pytest.mark.parametrize("name", sorted(MAKE))


def test_the_table_has_every_kind():
    assert {name.split(".")[0] for name in MAKE} - {"nested"} == {
        k for k in Change.kinds if not k.startswith("rice")
    }  # codecs on disk have a test of their own


@every
def test_properties(name):
    change, W = MAKE[name](), r(OUT, IN)
    before = W.clone()
    delta = change.delta(W)
    assert delta.shape == W.shape and change.weight_shape in (None, tuple(W.shape))
    torch.testing.assert_close(change.apply(W), W + delta)
    if not change.needs_weight:
        assert torch.equal(change.delta(), delta)
    # strength: linear, 1 is the change itself, 0 is the base bit for bit
    assert change.scaled(1) is change
    assert change.scaled(0).apply(W) is W
    for a in (-0.5, 0.3, 2.0):
        torch.testing.assert_close(change.scaled(a).delta(W), a * delta)
        torch.testing.assert_close(change.scaled(a).apply(W), W + a * delta)
    assert change.norm(W) == pytest.approx(float(delta.norm()), rel=1e-5)
    assert torch.equal(W, before)


@every
def test_saving_is_stable_and_bit_equal(name):
    change, W = MAKE[name](), r(OUT, IN)
    again = Change.read(change.config(), change.tensors())
    assert again.config() == change.config() and again.tensors().keys() == change.tensors().keys()
    assert torch.equal(again.apply(W), change.apply(W)) and again.parameters == change.parameters


@every
def test_half_precision_rounds_once(name):
    change, W = MAKE[name](), r(OUT, IN).bfloat16()
    new = change.apply(W)
    assert new.dtype == torch.bfloat16
    torch.testing.assert_close(new, change.apply(W.float()).bfloat16(), rtol=1e-2, atol=1e-2)


@every
def test_works_on_another_dtype_by_mapped(name):
    change, W = MAKE[name](), r(OUT, IN).double()
    wide = change.mapped(lambda t: t.double() if t.is_floating_point() else t)
    torch.testing.assert_close(wide.delta(W).double(), change.delta(W.float()).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x", sorted(MAKE))
@pytest.mark.parametrize("y", ["low_rank", "dense", "replace", "sum"])
def test_add_is_the_sum_of_differences(x, y):
    x, y, W = MAKE[x](), MAKE[y](), r(OUT, IN)
    torch.testing.assert_close(add(x, y).delta(W), x.delta(W) + y.delta(W))
    assert add(x.scaled(0), y) is y


def test_low_rank_sums_stay_low_rank():
    x, y = lora(0.5, 2), lora(0.5, 3)
    assert isinstance(both := add(x, y), LowRank) and both.rank == 5
    assert isinstance(add(x, lora(0.7)), Sum)


def test_exact_kinds_give_the_tuned_bits():
    W, tuned = r(OUT, IN), r(OUT, IN) * 1e-9
    assert torch.equal(Replace(tuned).apply(W), tuned) and not torch.equal(Dense(tuned - W).apply(W), tuned)
    change = sparse(new=True)
    new = change.apply(W).reshape(-1)
    assert torch.equal(new[change.indices.long()], change.values)


@pytest.mark.parametrize("kernel", [(3,), (3, 3)])
def test_convolutions(kernel):
    W = r(OUT, 4, *kernel)
    lora, kron = LowRank(r(2, 4, *kernel), r(OUT, 2), scale=0.5), Kronecker(r(2, 2), r(3, 2, *kernel))
    wanted = 0.5 * torch.einsum("or,r...->o...", lora.B, lora.A)
    torch.testing.assert_close(lora.delta(), wanted)
    for change in (lora, kron, Multiplied(r(OUT, *[1] * (W.dim() - 1))), Transformed(left=r(OUT, OUT)), Sparse.of(wanted)):
        torch.testing.assert_close(change.apply(W), W + change.delta(W))
    V = lora.apply(W)
    unit = V / V.flatten(1).norm(dim=1).view(-1, *[1] * (W.dim() - 1))
    torch.testing.assert_close(Renormalised(lora, torch.ones(OUT)).apply(W), unit)


def test_packing():
    signs = torch.randint(-1, 2, (7, 9)).to(torch.int8)
    change = Ternary.pack(signs)
    assert torch.equal(change.signs, signs) and change.bytes == 2 * ((63 + 7) // 8)
    dense = r(OUT, IN) * (r(OUT, IN) > 1)
    assert torch.equal(Sparse.of(dense).delta(), dense)


def test_differentiable():
    change = LowRank(r(2, IN).requires_grad_(), r(OUT, 2).requires_grad_(), scale=0.5)
    change.apply(r(OUT, IN)).square().sum().backward()
    assert change.A.grad.abs().sum() > 0 and change.B.grad.abs().sum() > 0


DENSE = {"kind": "dense"}


EDITED = [{"kind": "os"}, {}, DENSE | {"x": 1}, DENSE | {"scale": float("nan")}, DENSE | {"scale": "2"}]


@pytest.mark.parametrize("config", EDITED)
def test_an_edited_config_is_refused(config):
    with pytest.raises(UserError):
        Change.read(config, {"d": r(2, 2)})
