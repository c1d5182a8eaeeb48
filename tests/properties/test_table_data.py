"""Sources, rollouts, rewards and decoding: batches are functions of the step, rewards parse anything, a neutral hook does
nothing."""

import math
import random
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties.table import variants
from tiny import context, live, seed, seeing, shake, tiny, write_rows

from temperament import parts, protocols
from temperament.bases import worlds
from temperament.bases.load import load
from temperament.engine.responses import judged
from temperament.engine.tokens import Sampling, generate
from temperament.errors import UserError
from temperament.protocols import Progress
from temperament.run.check import online
from temperament.train.live import Live
from temperament.train.loop import Views


@pytest.fixture(scope="module")
def base():
    return load("lab/lm")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(23)]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", made)


@pytest.fixture(scope="module", autouse=True)
def pictures(tmp_path_factory):
    """A folder of two classes of pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for i in range(30):
        (folder / ("one", "two")[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (12, 9), (8 * i, 99, 255 - 8 * i)).save(folder / ("one", "two")[i % 2] / f"{i}.png")
    FOLDER.append(str(folder))


FOLDER = []


def filled(value, path):
    """The table's FILE is a file of this test, its FOLDER a folder of pictures."""
    if isinstance(value, dict):
        return {k: filled(v, path) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(v, path) for v in value]
    return path if value == "FILE" else FOLDER[-1] if value == "FOLDER" else value


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return all(equal(getattr(a, k), getattr(b, k)) for k in vars(a)) if hasattr(a, "__dataclass_fields__") else a == b


SOURCES = [p for p in variants("data") if hasattr(parts.get(p.values[0]), "open")]
TEXTS = [p for p in SOURCES if "text" in parts.get(p.values[0]).part_modalities]
SEEN = [p for p in SOURCES if hasattr(parts.get(p.values[0]), "classes")]
REWARDS = [p for p in variants("rewards") if "text" in parts.get(p.values[0]).part_modalities]


@pytest.mark.parametrize("name, options", SOURCES)
def test_a_batch_is_a_function_of_seed_and_step(base, rows, name, options):
    source, s = parts.build({name: filled(options, rows)}), seed()
    base = load("lab/policy") if "control" in source.part_modalities else base
    base = seeing() if "image" in source.part_modalities else base
    open_ = lambda s: source.open(context(base, seed=s, batch=4))
    one, two, other = open_(s), open_(s), open_(s + 1)
    steps = random.sample(range(20), 8)
    got = {k: two.batch(k, Progress(k, 20)) for k in steps}  # in any order, as after a kill
    assert all(equal(one.batch(k, Progress(k, 20)), got[k]) for k in sorted(steps))
    assert not all(equal(one.batch(k, Progress(k, 20)), other.batch(k, Progress(k, 20))) for k in range(6))
    assert {type(b).__name__ for b in got.values()} <= set(getattr(one, "yields", source.yields))
    assert all(0 < len(b) <= 5 for b in got.values()) and not online(source)  # nothing that trains was there to ask


@pytest.mark.parametrize("name, options", [p for p in TEXTS if "mix" not in p.id])
def test_an_epoch_sees_every_row_once(base, rows, name, options):
    stream = parts.build({name: filled(options, rows)}).open(context(base, batch=3))
    seen = [e for k in range(stream.steps_per_epoch) for e in stream.batch(k, None).examples[:, 0].tolist()]
    assert len(seen) == len(set(seen)) == len(stream.examples)
    again = [
        e
        for k in range(stream.steps_per_epoch, 2 * stream.steps_per_epoch)
        for e in stream.batch(k, None).examples[:, 0].tolist()
    ]
    assert sorted(again) == sorted(seen) and again != seen  # the next epoch in another order


@pytest.mark.parametrize("name, options", SEEN)
def test_pictures_once_an_epoch_and_none_that_is_held_out(name, options):
    base, source = seeing(), parts.build({name: filled(options, "")})
    stream = source.open(context(base, batch=1))
    classes, held = source.classes(base), source.held(base)
    seen = [stream.batch(k) for k in range(stream.steps_per_epoch)]
    assert sorted(int(b.examples) for b in seen) == list(range(len(stream.pictures)))
    pixels = lambda p: p.pixels((16, 16)).numpy().tobytes()
    assert sorted(b.pixels[0].numpy().tobytes() for b in seen) == sorted(pixels(p) for p in stream.pictures)
    assert all(b.pixels.shape == (1, 3, 16, 16) and b.pixels.min() >= 0 and b.pixels.max() <= 1 for b in seen)
    assert {int(b.labels) for b in seen} <= set(range(len(classes))) and len({int(b.labels) for b in seen}) > 1
    assert not {pixels(p) for p in held} & {pixels(p) for p in stream.pictures} and held
    assert all(0 <= p.label < len(classes) and p.caption for p in [*held, *stream.pictures])
    suites = [parts.build(s, protocols.Suite) for s in source.suites()]
    skills = [s for suite in suites for s in suite.skills(SimpleNamespace(base=base, items=7))]
    assert [s.role for s in skills] == ["target"] and [p.id for p in skills[0].pictures] == [p.id for p in held[:7]]


def test_lab_rows_are_never_test_items(base):
    for name in ("shift", "add", "people"):
        source = parts.build({"data.lab": {"skills": [name], "rows": 300}})
        asked = {e.prompt + str(e.completion) for e in source.examples(None)}
        test = {i.prompt + i.answer for i in worlds.skill(name).items("test", 100)}
        assert len(asked) > 20 and not asked & test
    pairs = parts.build({"data.lab": {"skills": ["add"], "rows": 40, "pairs": True}}).examples(None)
    assert all(p.chosen != p.rejected for p in pairs)
    two = parts.build({"data.lab": {"skills": ["add", "copy"], "rows": 10}}).examples(None)
    assert [e.meta["item"].skill for e in two] == ["add", "copy"] * 5
    with pytest.raises(UserError, match=r"shft.*shift"):
        parts.build({"data.lab": {"skills": ["shft"]}})


# ---- rollouts
# -----------------------------------------------------------------------------------------------------------------


class Asked(Exception):
    """The model that trains was asked for rows."""


class Watched(Live):
    def view(self, version="live"):
        raise Asked


@pytest.mark.parametrize("name, options", variants("rollout"))
def test_a_source_says_whether_the_model_that_trains_makes_its_rows(base, rows, name, options):
    """As does one that wraps it, whatever its room."""
    source = parts.build({name: filled(options, rows)})
    base = load("lab/policy") if "control" in source.part_modalities else base
    base = load("lab/vit") if "image" in source.part_modalities else base
    base = load("lab/unet") if "rewards.brightness" in options.get("rewards", ()) else base
    ctx = context(base, batch=12)
    ctx.live = Watched(base, [])
    ctx.views = Views(Live(base, []), ctx.world, 12, ctx.seed)
    try:
        source.open(ctx).batch(0, Progress(0, 20))
        asked = False
    except Asked:
        asked = True
    assert online(source) == online([source]) == asked


def rolling(base, s, world=None, **options):
    given = {
        "prompts": {"data.lab": {"skills": ["add"], "rows": 5}},
        "rewards": ["rewards.lab"],
        "group": 3,
        "max_new": 5,
        **options,
    }
    ctx = context(base, seed=s, batch=6)
    ctx.live = live(base, {"adapters.lora": {"rank": 2}})
    ctx.world = world or ctx.world
    return parts.build({"rollout.sample": given}).open(ctx)


def test_rollouts_are_a_function_of_step_and_policy(base):
    s = seed()
    one, two = rolling(base, s), rolling(base, s)
    a = [one.batch(k) for k in (0, 1, 2)]
    b = {k: two.batch(k) for k in (2, 0)}
    assert equal(a[0], b[0]) and equal(a[2], b[2])
    other = rolling(base, s + 1)
    assert not all(equal(a[k].tokens, other.batch(k).tokens) for k in (0, 1, 2))  # (one batch may be alike by chance)
    assert len(a[0]) == 6 and a[0].group.unique().numel() == 2 and a[0].tokens.examples[:, 0].unique().numel() == 6
    shake(one.ctx.live, 0.3)
    assert not torch.equal(one.batch(0).behaviour, a[0].behaviour)  # it samples from the policy as it stands
    one.ctx.live.close()


def test_rollouts_do_not_depend_on_the_world(base):
    """Two processes that each sample every other row put together the same batch."""
    s, everything = seed(), {}

    class Rank:
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def autocast(self):
            return nullcontext()

        def gather_rows(self, mine, count):
            everything[self.rank] = mine
            both = [everything.get(r) for r in range(2)]
            if None in both:  # the other process has not come yet: hold its place
                both = [m or mine for m in both]
            out = [None] * count
            for r, rows in enumerate(both):
                out[r::2] = rows
            return out

    whole = rolling(base, s).batch(3)
    rolling(base, s, Rank(0)).batch(3)
    split = rolling(base, s, Rank(1)).batch(3)
    assert equal(whole.tokens, split.tokens) and torch.equal(whole.rewards, split.rewards)
    assert torch.allclose(whole.behaviour, split.behaviour, atol=1e-5)


def test_its_temperature_may_follow_a_schedule(base):
    s, cold = seed(), {"schedules.linear": {"start": 1.0, "end": 0.05}}
    hot, cooled = rolling(base, s), rolling(base, s, temperature=cold)
    assert equal(hot.batch(0).tokens, cooled.batch(0, Progress(0, 10)).tokens)
    assert equal(rolling(base, s, temperature=0.05).batch(9).tokens, cooled.batch(9, Progress(9, 10)).tokens)


def test_behaviour_is_the_log_prob_of_what_was_sampled(base):
    from temperament.nn.logprobs import label, score

    stream = rolling(base, seed())
    batch = stream.batch(0)
    with torch.no_grad():
        assert torch.allclose(score(base.model, batch.tokens, label())["label"], batch.behaviour, atol=1e-4)
    assert (batch.behaviour[batch.tokens.weights == 0] == 0).all() and batch.tokens.weights.sum() > 0


def test_rewards_are_weighted_and_what_does_not_apply_adds_nothing(base):
    weights = [2.0, 0.5]
    stream = rolling(base, seed(), rewards=["rewards.lab", {"rewards.pattern": {"pattern": "."}}], weights=weights)
    marks = lambda stream, texts: judged(stream.spec.rewards, stream.spec.weights, stream.prompts[0], texts)
    texts = [stream.prompts[0].meta["answer"], "no", ""]
    assert marks(stream, texts) == [2.5, 0.5, 0.0]
    silent = rolling(base, seed(), prompts={"data.lab": {"skills": ["copy"], "rows": 5}}, rewards=["rewards.number"])
    assert marks(silent, texts) == [0.0] * 3
    with pytest.raises(UserError, match="as many weights"):
        rolling(base, 0, weights=[1.0, 1.0])
    with pytest.raises(UserError, match="multiple of the group"):
        rolling(base, 0, group=4)
    for bad in ({"group": 1}, {"temperature": 0.0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            rolling(base, 0, **bad)


# ---- rewards
# --------------------------------------------------------------------------------------------------------------------

ITEM = worlds.skill("add").items("test", 1)[0]
ROW = {"answer": "so it is 1,234.5", "item": ITEM}
HOSTILE = [
    "",
    " ",
    "\x00",
    "9" * 100_000,
    "-" * 5000,
    "1," * 20_000,
    "٣٤",
    "1e999",
    "nan",
    "inf",
    "__import__('os').system('x')",
    "²",
    "½",
    "(" * 3000,
    "\ud800",
]


@pytest.mark.parametrize("name, options", REWARDS)
@settings(max_examples=60, deadline=500)
@given(st.lists(st.one_of(st.text(max_size=60), st.sampled_from(HOSTILE), st.from_regex(r"[-+.,0-9 ]{0,30}")), max_size=5))
def test_a_reward_reads_any_text(name, options, outputs):
    made = parts.build({name: options} if options else name)
    marks = made.score("prompt", outputs, ROW)
    assert len(marks) == len(outputs) and all(m is None or (math.isfinite(m) and 0 <= m <= 1) for m in marks)
    assert marks == [made.score("prompt", [o], ROW)[0] for o in outputs]  # each on its own


@pytest.mark.parametrize("name, options", [p for p in REWARDS if "pattern" not in p.id])
def test_a_reward_says_which_column_is_missing(name, options):
    with pytest.raises(UserError):
        parts.build(name).score("p", ["1"], {"question": 1})


def test_rewards_by_example():
    score = lambda name, output, answer, **o: parts.build({f"rewards.{name}": o}).score("", [output], {"answer": answer})[0]
    assert score("exact", " a  b\n", "a b") == 1 and score("exact", "a b c", "a b") == 0
    for output, want in [("so 5 + 7 = 12.", 1), ("12 or 13", 0), ("-12", 0), ("12.0", 1), ("none", 0), ("1,2", 1), ("", 0)]:
        assert score("number", output, "the answer is 12") == want, output
    assert score("number", "1234.5", "1,234.5") == 1 and score("number", "3", "no number") is None
    assert score("pattern", "x 12 y", "", pattern=r"\d+") == 1 and score("pattern", "x 12", "", pattern=r"\d+", whole=True) == 0
    assert score("pattern", "12" + "x" * 5000, "", pattern=r"\d+") == 0
    with pytest.raises(UserError, match="no regular expression"):
        parts.build({"rewards.pattern": {"pattern": "("}})
    assert parts.build("rewards.lab").score("", [ITEM.answer, "999"], {"item": ITEM}) == [1.0, 0.0]
    assert re.fullmatch(r"\d+", ITEM.answer.strip())


# ---- decoding
# -------------------------------------------------------------------------------------------------------------------


def prompts(n=3):
    return [torch.randint(5, 61, (random.randint(1, 5),)).tolist() for _ in range(n)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_of_one_is_no_penalty(temperature):
    base, texts, s = tiny("llama"), prompts(), seed()
    run = lambda *hooks: generate(base.model, texts, Sampling(max_new=12, temperature=temperature), seed=s, eos=(), hooks=hooks)
    neutral = parts.build({"decode.repetition_penalty": {"penalty": 1.0}}).hooks(base)
    plain, same = run(), run(*neutral)
    assert plain.ids == same.ids and all(torch.equal(a, b) for a, b in zip(plain.logp, same.logp, strict=True))
    strong = run(*parts.build({"decode.repetition_penalty": {"penalty": 50.0}}).hooks(base))
    assert len(set(strong.ids[0])) > 6 and strong.ids != plain.ids


def test_the_penalty_by_its_formula_and_composed():
    z = torch.randn(2, 7)
    state = lambda z: SimpleNamespace(logits={"lm": z}, chosen=z, ids=[[1, 4, 4], []])
    hook = lambda p: parts.build({"decode.repetition_penalty": {"penalty": p}}).hooks(None)[0]
    got, want = hook(1.5).logits(state(z)), z.clone()
    for v in (1, 4):
        want[0, v] = z[0, v] / 1.5 if z[0, v] > 0 else z[0, v] * 1.5
    assert torch.allclose(got, want) and torch.equal(got[1], z[1])
    first = hook(1.5).logits(state(z))
    after = SimpleNamespace(logits={"lm": z}, chosen=first, ids=[[1, 4, 4], []])
    assert torch.allclose(hook(2.0).logits(after), hook(3.0).logits(state(z)))  # the second edits what the first left
    with pytest.raises(UserError, match="above 0"):
        hook(0.0)
