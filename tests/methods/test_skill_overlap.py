"""Overlap of skills by counting entries."""

from types import SimpleNamespace

import pytest
import torch
from tiny import rng, tiny

from temperament import parts
from temperament.delta import Delta, Dense, Sparse
from temperament.errors import UserError


def test_overlap_is_what_counting_gives(tmp_path):
    base, r = tiny("llama"), rng()
    names = [n for n, p in base.parameters() if "proj" in n]
    shapes = {n: p.shape for n, p in base.parameters()}
    masks = {k: {n: torch.rand(shapes[n], generator=r) < p for n in names} for k, p in (("a", 0.1), ("b", 0.3))}
    made = {k: Delta({n: Sparse.of(v.float()) for n, v in m.items()}, base=dict(base.sha256)) for k, m in masks.items()}
    made["b"].save(tmp_path / "b")
    look = parts.build({"diagnose.skill_overlap": {"others": [str(tmp_path / "b")]}})
    found = look.diagnose(SimpleNamespace(base=base, delta=made["a"]))
    count = lambda f: sum(int(f(n).sum()) for n in names)
    both, total = count(lambda n: masks["a"][n] & masks["b"][n]), sum(shapes[n].numel() for n in names)
    one, other = found["rows"]
    assert one["overlap"] == pytest.approx(both / count(lambda n: masks["a"][n]))
    assert other["overlap"] == pytest.approx(both / count(lambda n: masks["b"][n]))
    assert one["chance"] == pytest.approx(count(lambda n: masks["b"][n]) / total)
    same = look.diagnose(SimpleNamespace(base=base, delta=made["b"]))
    assert same["rows"][0]["overlap"] == 1


def test_of_a_whole_fine_tune_the_largest_entries_and_refusals(tmp_path):
    base = tiny("llama")
    d = Delta({n: Dense(torch.randn(p.shape, generator=rng())) for n, p in base.parameters()}, base=dict(base.sha256))
    d.save(tmp_path / "d")
    found = parts.build({"diagnose.skill_overlap": {"others": [str(tmp_path / "d")], "share": 0.05}})
    total = sum(p.numel() for _, p in base.parameters())
    assert found.diagnose(SimpleNamespace(base=base, delta=d))["entries"]["this"] == int(0.05 * total + 0.5)
    with pytest.raises(UserError, match="name the changes"):
        parts.build("diagnose.skill_overlap").diagnose(SimpleNamespace(base=base, delta=d))
