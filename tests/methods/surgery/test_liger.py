"""Liger: the chunked form is the recurrence, known cases are exact, the base stays reachable, it decodes and loads."""

from __future__ import annotations

import torch

from temperament.bases.load import load
from temperament.engine.tokens import Sampling, generate
from temperament.methods.adapters.lora import LoRA
from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
from temperament.methods.regularizers.kl import KL
from temperament.methods.surgery.liger import Liger, gated_linear
from temperament.nn import forward
from temperament.train.live import Live
from tests.methods.drive import carried_out, fresh, killed, laws, recipe, steps, tiny
from tests.train.rows import context

IDS = {"input_ids": torch.randint(5, 60, (2, 23), generator=torch.Generator().manual_seed(fresh())), "use_cache": False}


def logits(base, **inputs):
    with torch.no_grad():
        return base.model(**(inputs or IDS)).logits


def converted(base, **options):
    return Live(base, [Liger(**options).build(base, context(base))])


def test_chunks_are_the_recurrence():
    r = torch.Generator().manual_seed(fresh())
    q, k, v = (torch.randn(2, 3, 37, 5, generator=r, dtype=torch.float64) for _ in range(3))
    g = -torch.rand(2, 3, 37, 5, generator=r, dtype=torch.float64) * 30  # decays that would overflow if divided
    state, by_hand = torch.zeros(2, 3, 5, 5, dtype=torch.float64), []
    for t in range(37):
        state = g[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None]
        by_hand.append((q[:, :, t, None] @ state)[:, :, 0])
    assert torch.allclose(gated_linear(q, k, v, g), torch.stack(by_hand, 2))
    open_ = gated_linear(q, k, v, torch.zeros_like(g))  # gates at one: linear attention
    assert torch.allclose(open_, (q @ k.transpose(-1, -2)).tril() @ v)


def test_no_linear_half_and_a_long_window_is_the_original():
    base = tiny()
    before = logits(base)
    converted(base, share=0.0, window=23)
    assert torch.equal(logits(base), before)


def test_a_window_sees_so_many_tokens():
    base = tiny()
    converted(base, share=0.0, window=3)
    ids = IDS["input_ids"].clone()
    one = logits(base)
    ids[:, 4] = (ids[:, 4] + 7) % 50 + 5
    moved = (logits(base, input_ids=ids, use_cache=False) - one).abs().amax((0, 2)) > 0
    assert moved.nonzero().reshape(-1).tolist() == list(range(4, 9))  # two layers of a window of three


def test_a_head_is_the_mean_of_its_halves():
    base = tiny()
    whole = {}
    for share in (0.0, 0.5, 1.0):
        live = converted(base, share=share, window=4)
        attention = base.model.model.layers[0].self_attn
        seen = []
        handle = attention.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0]))
        logits(base)
        handle.remove()
        live.close()
        whole[share] = seen[0]
    assert torch.allclose(whole[0.5], (whole[0.0] + whole[1.0]) / 2, atol=1e-6)


def test_the_base_stays_a_version_and_a_teacher():
    base = tiny()
    before = logits(base)
    live = converted(base)
    assert not torch.allclose(logits(base), before)
    for version in ("base", "start"):
        with live.at(version):
            assert torch.equal(logits(base), before)
    live.close()
    stack = [Liger(window=4), LoRA(rank=2, targets=["q", "k", "v"])]
    player = steps(base, 2, trainable=stack, objective=CrossEntropy(), regularizers=[KL(weight=1.0, direction="forward")])
    assert all(p.tensor.grad is None for p in player.live.params.values()) and len(player.live.params) == 2 * 3 * 2
    player.live.close()
    assert torch.equal(logits(base), before)


def test_left_padding_changes_nothing():
    base = tiny()
    converted(base, window=4)
    ids = IDS["input_ids"]
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(28) >= 5).long().expand(2, -1)
    got = logits(base, input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False)
    assert torch.allclose(got[:, 5:], logits(base), atol=1e-5)


def test_what_was_measured_of_the_base_is_measured_again():
    base = tiny()
    prompts = [IDS["input_ids"][0, :9].tolist(), IDS["input_ids"][1, :5].tolist()]
    first = generate(base.model, prompts, Sampling(max_new=5))
    assert forward.can_pack(base.model)
    live = converted(base, window=4)
    assert not forward.can_pack(base.model)
    together = generate(base.model, prompts, Sampling(max_new=5))
    for prompt, out in zip(prompts, together.ids, strict=True):  # as the parallel form says, token by token
        row = list(prompt)
        for token in out:
            assert int(logits(base, input_ids=torch.tensor([row]), use_cache=False)[0, -1].argmax()) == token
            row.append(token)
    live.close()
    assert generate(base.model, prompts, Sampling(max_new=5)).ids == first.ids


def test_the_exactness_law():
    laws(tiny(), trainable=[Liger(window=4), LoRA(rank=2, targets=["q", "k", "v"])])


def test_a_killed_run_goes_on_to_the_same_bits_and_loads(tmp_path):
    plan = recipe(["surgery.liger", {"adapters.lora": {"rank": 2, "targets": ["q", "k", "v"]}}], steps=3)
    whole, broken = carried_out(plan, tmp_path / "a"), killed(plan, tmp_path / "b", after=2)
    assert whole.delta.digest == broken.delta.digest and len(whole.delta.additions) == 4
    again = load(tmp_path / "a")
    assert len(again.hung) == 4
    with torch.no_grad():
        assert torch.equal(logits(again), whole.model(**IDS).logits)
