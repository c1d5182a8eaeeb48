"""LoRA's fused map takes one of two orders of the same product by the number of tokens: both are the formula, in value and
gradient."""

import pytest
import torch
import torch.nn.functional as F

from temperament.methods.adapters.lora import LoRAPiece
from temperament.nn.pieces import Switch, attach


@pytest.mark.parametrize(("wide", "out"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("tokens", [1, 30, 60, 100, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_both_orders_are_the_formula(wide, out, tokens, bias):
    linear = torch.nn.Linear(wide, out, bias=bias).double().requires_grad_(False)
    linear32 = torch.nn.Linear(wide, out, bias=bias).requires_grad_(False)
    linear32.load_state_dict({k: v.float() for k, v in linear.state_dict().items()})
    A, B = torch.randn(4, wide), torch.randn(out, 4)
    piece = LoRAPiece(A, B, 0.7, "linear", 0.0, "x")
    attach(linear32, piece, Switch())
    x32 = torch.randn(2, tokens, wide).transpose(0, 1).requires_grad_(True)  # not contiguous
    x, A, B = x32.detach().double().requires_grad_(True), A.double().requires_grad_(True), B.double().requires_grad_(True)
    y = linear(x) + 0.7 * F.linear(F.linear(x, A), B)
    g = torch.randn(y.shape).transpose(0, 1).contiguous().transpose(0, 1)
    wanted = torch.autograd.grad(y, (x, A, B), g.double())
    made = linear32(x32)
    found = torch.autograd.grad(made, (x32, piece.A, piece.B), g)
    for a, b in zip((made, *found), (y, *wanted), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["all-linear"], ["q", "v"]])
def test_autocast_agrees_with_bf16(targets):
    """Some maps adapted and others not must still meet in one dtype, and the gradients are those of the fp32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from temperament.bases.load import Base
    from temperament.methods.adapters.lora import LoRA
    from temperament.train.context import Context
    from temperament.train.live import Live
    from temperament.train.world import World

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    base = Base("python", {"lm": LlamaForCausalLM(config)}, sha256={"lm": "none"})
    live = Live(base, [LoRA(rank=4, targets=targets).build(base, Context(base, World()))])
    for p in live.params.values():
        torch.nn.init.normal_(p.tensor, std=0.1)
    ids = torch.randint(1, 64, (3, 9))
    grads = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = base.model(input_ids=ids, labels=ids).loss
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p.tensor for p in live.params.values()])]))
    assert grads[1].dtype == torch.float32
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.1
    live.close()
