"""Maps that read one tensor, computed as one product: the same numbers, and nothing left behind."""

import pytest
import torch
from models import MODELS
from tiny import seed

from temperament.nn.joint import groups, joint
from temperament.nn.pieces import Piece, Switch, attach


@pytest.mark.parametrize("name", [n for n, tiny in MODELS.items() if tiny.language == "causal"])
def test_same_logits_and_nothing_left(name):
    model = MODELS[name].build(seed())
    ids = torch.randint(3, 60, (3, 7))
    before = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    with torch.no_grad():
        want = model(input_ids=ids).logits
        with joint(model):
            got = model(input_ids=ids).logits
    assert torch.allclose(want, got, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert before == {n: m.__dict__.get("forward") for n, m in model.named_modules()}


def llama():
    return MODELS["llama"].build(seed())


def test_groups_are_seen():
    model = llama()
    names = {id(m): n.rsplit(".", 1)[1] for n, m in model.named_modules() if n.endswith("_proj")}
    found = [[names[id(m)] for m in group] for group in groups(model)]
    assert found == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * model.config.num_hidden_layers


def test_other_weights_and_pieces_and_gradients_are_what_they_are():
    model, ids = llama(), torch.randint(3, 60, (2, 5))
    call = lambda: model(input_ids=ids).logits
    q, up = model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.up_proj
    with torch.no_grad(), joint(model):
        for m in (q, up):  # another version's weights by pointer
            own = m._parameters["weight"]
            m._parameters["weight"] = torch.nn.Parameter(torch.randn_like(own))
            changed = call()
            m._parameters["weight"] = own
            want = call()
            assert not torch.allclose(changed, want, atol=1e-3)
    with joint(model):
        call().sum().backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())

    class Twice(Piece):
        def forward(self, x, base):
            return 2 * base(x)

    detach = attach(q, Twice(), Switch())
    with torch.no_grad():
        want = call()
        with joint(model):
            assert torch.allclose(call(), want, atol=1e-5)
    detach()
    assert "forward" not in q.__dict__
