"""A base and the change applied to it."""

import pytest
import torch
from torch import nn

from temperament.bases.load import Base
from temperament.delta import Delta, Dense, LowRank, Replace
from temperament.errors import UserError


def base(device="cpu"):
    return Base("net", {"lm": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(device)}, sha256={"lm": "-"})


def change():
    return Delta(
        {"lm/0.weight": LowRank(torch.randn(2, 4), torch.randn(3, 2), scale=0.5), "lm/0.bias": Dense(torch.randn(3))},
        buffers={"lm/1.running_mean": torch.randn(3)},
        strength=0.7,
    )


def test_what_is_applied_is_the_delta_at_its_strength_and_goes_again():
    it, delta = base(), change()
    pure = {n: t.detach().clone() for n, t in (*it.parameters(), *it.buffers())}
    it.apply(delta, 0.3)
    want = (delta * 0.3).apply(pure)
    assert all(torch.equal(t, want[n]) for n, t in (*it.parameters(), *it.buffers()))
    it.reset()
    assert all(torch.equal(t, pure[n]) for n, t in (*it.parameters(), *it.buffers()))


def test_a_delta_from_disk_follows_the_base_to_its_device():
    it = base("meta")  # stands for an accelerator: what is on the CPU cannot be added to it
    it.apply(change())
    assert all(t.device.type == "meta" for _, t in it.parameters())


@pytest.mark.parametrize("wrong", [Dense(torch.zeros(5, 4)), Dense(torch.zeros(3, 1)), Replace(torch.zeros(4, 3))])
def test_a_delta_of_another_shape_is_refused_in_a_sentence_and_nothing_is_changed(wrong):
    it = base()
    with pytest.raises(UserError, match="shape of lm/0"):
        it.apply(Delta({"lm/0.weight": wrong}))
    assert not it.originals
