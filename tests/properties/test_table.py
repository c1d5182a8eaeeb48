"""What every part has whatever its room, and the small rooms: schedules and optimizers."""

import math
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from properties.table import TABLE, variants
from tiny import rng

from temperament import parts, protocols
from temperament.protocols import Progress
from temperament.train import checkpoint
from temperament.train.trained import Param

ALL = [pytest.param(name, o, id=f"{name}-{i}") for name, options in TABLE.items() for i, o in enumerate(options)]


def test_every_part_has_its_line_and_a_test_that_names_it():
    """By its name in a recipe or by its class, in a file that is not about all parts."""
    assert set(TABLE) == set(parts.names()), "a new part is one line in tests/properties/table.py"
    tests = "".join(p.read_text() for p in Path(__file__).parents[1].rglob("test_*.py") if p.name != "test_table.py")
    made = {name: type(parts.build({name: options[0]} if options[0] else name)).__name__ for name, options in TABLE.items()}
    missing = [n for n, kind in made.items() if not re.search(rf"{re.escape(n)}\b|\b{kind}\b", tests)]
    assert not missing, "a part is tested by what it promises"


@pytest.mark.parametrize("name, options", ALL)
def test_reading_and_building_are_inverse(name, options):
    made = parts.build({name: options} if options else name)
    shown = parts.plain(made)
    assert parts.build(shown) == made and parts.plain(parts.build(shown)) == shown
    if isinstance(shown, dict):  # every default is visible
        assert set(shown[name]) == set(parts.card(name).options)
    assert next(iter(parts.walk(made))) is made


@pytest.mark.parametrize("name, options", ALL)
def test_the_card_is_complete(name, options):
    card = parts.card(name)
    assert 20 < len(card.summary) <= 130, card.summary
    assert all(o["help"] for o in card.options.values()), [k for k, o in card.options.items() if not o["help"]]
    assert all(len(p) == 3 and p.isdigit() and int(p) <= 306 for p in card.papers)
    assert set(card.modalities) <= {"any", "text", "image", "video", "audio", "control"}
    import json

    json.dumps(card.to_json(), allow_nan=False)


@pytest.mark.parametrize("name, options", ALL)
def test_a_part_fills_the_slots_of_its_room_and_no_other(name, options):
    made = parts.build({name: options} if options else name)
    slots = [s for s in vars(protocols).values() if parts.is_slot(s)]
    taken = []
    for slot in slots:
        if any(name.startswith(room + ".") for room in slot.rooms) and all(hasattr(type(made), m) for m in slot.must):
            assert parts.build(made, slot) is made
            taken.append(slot)
        else:
            with pytest.raises(parts.UserError):
                parts.build({name: options}, slot)
    assert taken, "no slot takes it"


@pytest.mark.parametrize("name, options", ALL)
def test_a_number_that_is_read_anew_may_be_a_schedule(name, options):
    """What a part checks of its numbers waits until they are numbers."""
    made = parts.build({name: options} if options else name)
    mine = lambda s: any(name.startswith(room + ".") for room in s.rooms) and all(hasattr(type(made), m) for m in s.must)
    slots = [s for s in vars(protocols).values() if parts.is_slot(s) and mine(s)]
    known = getattr(type(made), "scheduled", any(getattr(s, "scheduled", False) is True for s in slots))
    for key, (_, hint) in parts._named_hints(type(made)).items():
        value = getattr(made, key)
        if hint in (float, float | None) and value is not None and (known is True or (known and key in known)):
            moving = parts.build({name: {**options, key: {"schedules.constant": {"value": value}}}}, slots[0])
            assert parts.at(moving, Progress(3, 9)) == made, key


# ---- schedules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", variants("schedules"))
def test_a_schedule_is_a_pure_function_between_its_ends(name, options):
    total, schedule = random.randint(20, 60), parts.build({name: options})
    curve = [schedule(Progress(k, total)) for k in range(total)]
    again = pickle.loads(pickle.dumps(schedule))
    order = random.sample(range(total), total)
    assert [again(Progress(k, total)) for k in order] == [curve[k] for k in order]
    asked = [options[k] for k in ("value", "peak", "start", "end") if k in options] + list(options.get("values", ()))
    assert all(math.isfinite(v) and -1e-12 <= v <= max(asked) + 1e-12 for v in curve)
    warmup = options.get("warmup", 0)
    top = next((options[k] for k in ("value", "peak") if k in options), None)
    if warmup and top:  # linear from 0, reaching the peak at its last step
        assert curve[:warmup] == pytest.approx([top * (k + 1) / warmup for k in range(warmup)])
        assert curve[warmup] == pytest.approx(top, rel=0.02)
    if name in ("schedules.cosine", "schedules.linear", "schedules.wsd"):
        assert curve[-1] == pytest.approx(options.get("end", 0.0), abs=1e-9)
        assert math.isfinite(schedule(Progress(0, 1)))  # a single step
    if name in ("schedules.cosine", "schedules.linear") and not warmup:
        assert curve[0] == pytest.approx(options.get("peak", options.get("start")))
    for round in range(3):
        assert parts.at(schedule, Progress(3, total, round=round)) == schedule(Progress(3, total, round=round))


def test_schedules_by_their_formulas():
    total = random.randint(30, 50)
    at = lambda name, k, round=0, **o: parts.build({f"schedules.{name}": o})(Progress(k, total, round=round))
    middle = (total - 1) / 2
    if middle == int(middle):
        assert at("cosine", int(middle), peak=2.0, end=1.0) == pytest.approx(1.5)
    k = random.randrange(total)
    assert at("linear", k, start=1.0, end=3.0) == pytest.approx(1 + 2 * k / (total - 1))
    assert at("linear", k, start=1.0, end=3.0, begin=0.5) == pytest.approx(1 + 2 * max(k / (total - 1) - 0.5, 0) / 0.5)
    assert at("wsd", k, peak=2.0, end=0.5, decay=0.25) == pytest.approx(0.5 + 1.5 * min(1, (1 - k / (total - 1)) / 0.25))
    share = k / (total - 1)
    assert at("steps", k, values=[1.0, 2.0, 3.0], at=[0.3, 0.6]) == (1 if share < 0.3 else 2 if share < 0.6 else 3)
    assert [at("steps", k, r, values=[1.0, 5.0], by="round") for r in range(3)] == [1, 5, 5]


# ---- optimizers --------------------------------------------------------------------------------------------------------------


def parameters(*shapes):
    r = rng()
    make = lambda i, s: Param(
        f"lm/{i}.{'weight' if len(s) > 1 else 'bias'}", torch.nn.Parameter(torch.randn(s, generator=r)), decay=len(s) > 1
    )
    return [make(i, s) for i, s in enumerate(shapes)]


def walk(part, params, steps, stepper, progress=lambda k: Progress(k, 1)):
    """`steps` updates towards random targets, the gradients addressed by the step."""
    for k in range(*steps):
        for group in stepper.param_groups:
            group["lr"] = parts.at(part, progress(k)).lr * group.get("lr_factor", 1.0)
        for i, p in enumerate(params):
            p.tensor.grad = torch.randn(p.tensor.shape, generator=torch.Generator().manual_seed(1000 * k + i))
        stepper.step()


@pytest.mark.parametrize("name, options", variants("optim"))
def test_an_optimizer_finds_the_minimum_of_a_quadratic(name, options):
    part, (p,) = parts.build({name: options}), parameters((4, 3))
    stepper, goal = part.build([p], None), torch.randn(4, 3, generator=rng())
    for k in range(400):
        for group in stepper.param_groups:
            group["lr"] = part.lr * min(1, 3 * (1 - k / 400))
        p.tensor.grad = p.tensor.detach() - goal
        stepper.step()
    assert torch.allclose(p.tensor, goal, atol=0.05)


@pytest.mark.parametrize("name, options", variants("optim"))
def test_its_state_goes_through_a_checkpoint_to_the_bit(name, options, tmp_path):
    part, start = parts.build({name: options}), parameters((4, 3), (3,), (2, 2, 2))
    copy = lambda: [Param(p.name, torch.nn.Parameter(p.tensor.detach().clone()), decay=p.decay) for p in start]
    one, two = copy(), copy()
    whole, first = part.build(one, None), part.build(two, None)
    walk(part, one, (0, 6), whole)
    walk(part, two, (0, 3), first)
    tensors, rest = checkpoint.flatten_optimizer(first)
    values = {p.name: p.tensor.detach().clone() for p in two}
    checkpoint.save(tmp_path / "c", 3, {"live": values, "optimizer": tensors}, {"optimizer": rest})
    state, stored = checkpoint.load_newest(tmp_path / "c")
    three = [Param(p.name, torch.nn.Parameter(stored["live"][p.name].clone()), decay=p.decay) for p in two]
    second = part.build(three, None)
    checkpoint.unflatten_optimizer(second, stored.get("optimizer", {}), state["optimizer"])
    walk(part, three, (3, 6), second)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("name, options", variants("optim"))
def test_its_rate_follows_a_schedule_and_each_tensor_its_factor(name, options):
    half = {"schedules.constant": {"value": options["lr"], "warmup": 4}}
    part, plain = (parts.build({name: {**options, "lr": lr}}, protocols.Optimizer) for lr in (half, options["lr"]))
    assert parts.at(part, Progress(1, 9)).lr == pytest.approx(options["lr"] / 2) and parts.at(part, Progress(8, 9)) == plain
    a, b = parameters((4, 3)), parameters((4, 3))
    b[0].tensor.data = a[0].tensor.detach().clone()
    b[0].lr_factor, before = 3.0, a[0].tensor.detach().clone()
    for p in (a, b):
        walk(plain, p, (0, 1), plain.build(p, None))
    assert torch.allclose(b[0].tensor - before, 3 * (a[0].tensor - before), atol=1e-5)
    still = parameters((3, 3))
    was = still[0].tensor.detach().clone()
    walk(parts.build({name: {**options, "lr": 0.0}}), still, (0, 2), plain.build(still, None))
    assert torch.equal(still[0].tensor, was)


def test_adamw_by_hand():
    lr, b1, b2, eps, decay = 0.03, 0.8, 0.95, 1e-6, 0.1
    part = parts.build({"optim.adamw": {"lr": lr, "betas": [b1, b2], "eps": eps, "weight_decay": decay}})
    params = parameters((5, 4), (4,))
    want = [p.tensor.detach().double().clone() for p in params]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in want]
    stepper = part.build(params, None)
    for t in range(1, 8):
        for group in stepper.param_groups:
            group["lr"] = lr
        for i, p in enumerate(params):
            p.tensor.grad = torch.randn(p.tensor.shape, generator=rng())
            m, v = moments[i]
            g = p.tensor.grad.double()
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            step = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
            want[i] -= lr * (step + (decay if p.tensor.dim() > 1 else 0) * want[i])  # vectors are not decayed
        stepper.step()
    assert all(torch.allclose(p.tensor.double(), w, atol=1e-6) for p, w in zip(params, want, strict=True))


def test_sgd_by_hand():
    lr, mu, decay = 0.1, 0.6, 0.05
    part = parts.build({"optim.sgd": {"lr": lr, "momentum": mu, "weight_decay": decay}})
    (p,) = parameters((3, 2))
    want, b, stepper = p.tensor.detach().clone(), torch.zeros(3, 2), part.build([p], None)
    for _ in range(5):
        for group in stepper.param_groups:
            group["lr"] = lr
        p.tensor.grad = torch.randn(3, 2, generator=rng())
        b = mu * b + p.tensor.grad + decay * want
        want = want - lr * b
        stepper.step()
    assert torch.allclose(p.tensor, want, atol=1e-6)
