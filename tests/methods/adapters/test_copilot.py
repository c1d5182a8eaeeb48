"""The copilot: errors as defined, strictly causal, exact where it knows everything, and a pilot that does not notice it."""

from __future__ import annotations

import pytest
import torch

from temperament import parts
from temperament.bases.load import load
from temperament.engine.error_model import trace
from temperament.engine.tokens import Sampling, generate
from temperament.errors import UserError
from temperament.methods.adapters.copilot import CopilotAdapter, Log
from temperament.methods.adapters.lora import LoRA
from temperament.methods.decode.copilot import CopilotDecode
from temperament.methods.select.full import Full
from temperament.run.recipe import read
from tests.methods.drive import carried_out, fresh, killed, laws, recipe, steps, tiny
from tests.train.rows import Rows, tokens


@torch.no_grad()
def shaken(copilot, seed):
    r = torch.Generator().manual_seed(seed)
    for p in copilot.parameters():
        p.add_(0.2 * torch.randn(p.shape, generator=r))
    return copilot


def trained(base, n=0, **options):
    player = steps(base, n, trainable=[Full(), CopilotAdapter(**options)])
    return player, player.live.parts[1].around["lm/lm_head:copilot"][1]


def test_errors_are_the_definition_and_sum_to_nothing():
    base, seed = tiny(), fresh()
    one, blocks = tokens(4, seed), base.places.blocks()
    into, inner, error = trace(base.model, one, blocks)
    with torch.no_grad():
        out = base.model(input_ids=one.ids, output_hidden_states=True, use_cache=False)
    probabilities = out.logits.softmax(-1)
    for i in range(len(one)):
        for t in range(one.ids.shape[1]):
            want = torch.zeros(error.shape[-1])
            if one.weights[i, t]:
                want = -probabilities[i, t - 1]
                want[one.ids[i, t]] += 1
            assert torch.allclose(error[i, t], want, atol=1e-5), (seed, i, t)
    assert float(error.sum(-1).abs().max()) < 1e-4 and float(error.abs().max()) <= 1
    assert torch.allclose(into, out.hidden_states[0], atol=1e-6)
    # (what transformers gives last has gone through the final norm: of the states before it the last is not shown)
    assert inner.shape == into.shape and not inner.requires_grad


@pytest.mark.parametrize("packed", [False, True])
def test_it_sees_what_is_before_and_nothing_after_or_beside(packed):
    base, seed = tiny(), fresh()
    player, copilot = trained(base)
    shaken(copilot, seed)
    one = Rows(longest=9, packed=packed).make(4, seed % 1000)
    into, inner, error = trace(base.model, one, base.places.blocks())
    error = error + 0.1 * torch.randn(error.shape, generator=torch.Generator().manual_seed(seed))
    says = lambda *parts: copilot.predict(*parts, one.segments, one.positions).detach()
    plain, t = says(into, inner, error), 4
    for k in range(3):
        moved = [into.clone(), inner.clone(), error.clone()]
        moved[k][:, t] += 1
        change = (says(*moved) - plain).abs().amax(-1)
        own = (one.segments == one.segments[:, t : t + 1]) & (torch.arange(one.ids.shape[1]) >= t)
        assert bool((change[~own] == 0).all()) and bool((change[one.mask & own] > 0).all()), (seed, k)
    player.live.close()


def test_the_pilot_does_not_notice_it():
    seed = fresh()
    alone = steps(tiny("llama_tied", seed), 4, trainable=[Full()])
    player = steps(tiny("llama_tied", seed), 4, trainable=[Full(), CopilotAdapter()])
    assert all(torch.equal(p.tensor, player.live.params[n].tensor) for n, p in alone.live.params.items())
    copilot = player.live.parts[1].around["lm/lm_head:copilot"][1]
    assert float(copilot.leave.weight.detach().abs().max()) > 0  # and it learnt
    for p in (alone, player):
        p.live.close()


def test_the_loss_is_the_root_of_the_mean_square_of_the_drawn_step():
    player, copilot = trained(tiny(), 3)
    lesson = player.live.parts[1].terms[0]
    shaken(copilot, fresh())
    record = lesson.log.draw(2)
    shape = record["segments"].shape
    error = torch.zeros(shape.numel(), record["error"].shape[-1])
    error[record["at"]] = record["error"]
    error = error.view(*shape, -1)
    out = copilot.predict(record["into"], record["inner"], error, record["segments"], record["positions"])
    squares = [((out[i, t - 1] - error[i, t]) ** 2).sum() for i, t in (divmod(k, shape[1]) for k in record["at"].tolist())]
    lesson.drawn = record
    got = lesson.loss(None, None)["copilot"].value
    assert torch.allclose(got, (sum(squares) / len(squares)).sqrt(), rtol=1e-4)
    got.backward()
    assert all(p.tensor.grad is None for n, p in player.live.params.items() if ":copilot" not in n)
    player.live.close()


def test_the_log_is_a_fair_sample_of_all_steps_and_its_own_state():
    counts, keep, n, runs = torch.zeros(12), 4, 12, 200
    for seed in range(runs):
        log = Log(keep, seed + fresh())
        for s in range(n):
            log.add(s, {"x": torch.tensor(float(s))})
            log.add(s, {"x": torch.tensor(float(s))})  # the same step again is the same record
        counts[sorted(log.records)] += 1
        assert len(log.records) == keep == len(set(log.places.values()))
    assert float((counts / runs - keep / n).abs().max()) < 0.17  # 5 standard deviations
    again = Log(keep, log.seed)
    again.load(log.state())
    for s in range(n, n + 9):
        for one in (log, again):
            one.add(s, {"x": torch.tensor(float(s))})
    assert log.places == again.places and torch.equal(log.draw(9)["x"], again.draw(9)["x"])


class Oracle(torch.nn.Module):
    """Foresees the error against given answers exactly."""

    strength = 1.0

    def __init__(self, model, prompts, answers):
        super().__init__()
        self.model, self.texts = model, [p + a for p, a in zip(prompts, answers, strict=True)]

    def foreseen(self, copilot, model, blocks, state):
        want = [self.texts[row][len(state.prompts[i]) + state.step] for i, row in enumerate(state.rows)]
        one = torch.nn.functional.one_hot(torch.tensor(want), state.chosen.shape[-1])
        return one - state.chosen.softmax(-1)


def test_an_oracle_gives_the_answer_whatever_the_pilot_says(monkeypatch):
    base, seed = tiny(), fresh()
    player, _ = trained(base)
    r = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(5, 60, (int(n),), generator=r).tolist() for n in (3, 7, 5)]
    answers = [torch.randint(5, 60, (6,), generator=r).tolist() for _ in prompts]
    oracle = Oracle(base.model, prompts, answers)
    monkeypatch.setattr("temperament.methods.decode.copilot.foreseen", oracle.foreseen)
    for temperature in (0.0, 1.0):
        made = generate(base.model, prompts, Sampling(6, temperature), hooks=CopilotDecode().hooks(base), eos=(), seed=seed)
        assert made.ids == answers
    player.live.close()


def test_decoding_feeds_it_its_own_guesses_and_nothing_is_the_pilot():
    base, seed = tiny(), fresh()
    r = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(5, 60, (int(n),), generator=r).tolist() for n in (3, 7, 5, 3)]
    say = lambda **o: generate(base.model, prompts, Sampling(6), hooks=CopilotDecode(**o).hooks(base), eos=()).ids
    plain = generate(base.model, prompts, Sampling(6), eos=()).ids
    assert say() == plain  # none hangs on it
    player, copilot = trained(base)
    assert say() == plain  # it foresees nothing yet
    shaken(copilot, seed)
    assert say(lam=0.0) == plain and say(lam=3.0) != plain
    blocks, lam = base.places.blocks(), 0.7
    got = say(lam=lam)
    for prompt, said in zip(prompts, got, strict=True):  # one row, from the beginning at each token
        ids, own = list(prompt), []
        for token in said:
            one = torch.tensor([ids])
            rows = type(tokens(1, 0))(one, torch.zeros(one.shape), torch.zeros_like(one), torch.zeros_like(one))
            into, inner, _ = trace(base.model, rows, blocks)
            error = torch.cat([torch.zeros(len(prompt), base.model.config.vocab_size), *(f[None] for f in own)])[None]
            f = copilot.predict(into, inner, error, rows.segments, rows.positions)[0, -1].detach()
            with torch.no_grad():
                p = base.model(input_ids=one).logits[0, -1].softmax(-1) + lam * f
            assert int(p.argmax()) == token or float(p.max() - p[token]) < 1e-5, seed
            own.append(f)
            ids.append(token)
    player.live.close()


def test_its_laws_hold_and_other_rows_are_refused():
    laws(tiny(), trainable=[Full(), CopilotAdapter()], source=Rows())
    laws(tiny("qwen3"), trainable=[LoRA(rank=2), CopilotAdapter(layers=3)], source=Rows(packed=True))
    with pytest.raises(UserError, match="given answers"):
        dpo = parts.build("objectives.preference.dpo")
        steps(tiny(), 1, trainable=[Full(), CopilotAdapter()], source=Rows(kind="Pairs"), objective=dpo)
    with pytest.raises(UserError, match="language model"):
        CopilotAdapter().build(tiny("bert"), None)


def test_killed_it_goes_on_to_the_same_bits_and_flies_from_a_delta(tmp_path):
    document = recipe(["select.full", {"adapters.copilot": {"keep": 2}}], 5, seed=fresh() % 1000, save={"steps": 1}, clip=None)
    document["inference"] = ["decode.copilot"]
    whole = carried_out(document, tmp_path / "whole")
    again = killed(document, tmp_path / "killed", after=3)
    assert whole.json["delta"]["digest"] == again.json["delta"]["digest"]
    from temperament.delta import Delta
    from temperament.engine.error_model import beside

    delta = Delta.load(tmp_path / "whole" / "delta")
    base = load("lab/lm")
    base.apply(delta)
    copilot = beside(base.model)
    saved = delta.additions["lm/lm_head:copilot"].tensors
    assert all(torch.equal(p, saved[n]) for n, p in copilot.named_parameters())
    base.reset()
    assert beside(base.model) is None


def test_the_preset_is_a_recipe():
    assert read("recipes/t_copilot.yaml").inference[0].lam == 1.0
