"""The worlds: the same everywhere, truly held out, and with oracles that are right."""

import hashlib
import json
import os
import re
import subprocess
import sys
from operator import add, mul, sub

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temperament.bases import worlds
from temperament.bases.worlds import Item, people, procedures, recall, text
from temperament.bases.worlds.draw import Draw, split_of
from temperament.bases.worlds.skill import same_text
from temperament.errors import UserError

SKILLS = worlds.skills()
EXACT = [n for n, s in SKILLS.items() if s.metric == "exact"]


def fingerprint() -> str:
    rows = [(i.id, i.prompt, i.answer) for s in SKILLS.values() for split in ("train", "test") for i in s.items(split, 20)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def test_the_same_world_in_another_process_with_another_hash_seed_and_without_torch():
    code = (
        "import sys; import hashlib, json; from temperament.bases import worlds;"
        "rows = [(i.id, i.prompt, i.answer) for s in worlds.skills().values()"
        " for p in ('train', 'test') for i in s.items(p, 20)];"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules;"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    for seed in ("1", "77"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert out.returncode == 0, out.stderr
        assert out.stdout.strip() == fingerprint()


@pytest.mark.parametrize("name", list(SKILLS))
def test_splits_share_nothing_and_items_are_stable(name):
    skill = SKILLS[name]
    train, test = skill.items("train", 300), skill.items("test", 200)
    assert not {i.prompt + i.answer for i in train} & {i.prompt + i.answer for i in test}
    assert skill.items("test", 50) == test[:50], "a shorter list is a prefix"
    assert [i.id for i in test] == [f"{name}/test/{k}" for k in range(len(test))]
    assert len({i.prompt + i.answer for i in test}) == len(test)
    assert len(test) >= (20 if name == "fact-capitals" else 90)
    other = skill.items("test", 20, seed=5)
    assert other != test[:20] and other[0].id == f"{name}/test/s5/0"
    assert all(not i.prompt.endswith((" ", "\n")) and i.answer.strip() for i in train + test)


@pytest.mark.parametrize("name", EXACT)
def test_the_oracle_passes_and_a_wrong_answer_does_not(name, tmp_path):
    skill = SKILLS[name]
    items = skill.items("test", 60)
    for item in items:
        assert skill.check(item, skill.oracle(item))
        assert skill.check(item, f"  {item.answer} </s><pad> anything after the end")
        assert not skill.check(item, "") and not skill.check(item, "zzz")
    path = tmp_path / "pairs.jsonl"
    assert worlds.write_jsonl(skill, path, 60, "test", form="pairs") == len(items)
    for item, line in zip(items, path.read_text().splitlines(), strict=True):
        row = json.loads(line)
        assert row["chosen"] == item.answer and not skill.check(item, row["rejected"]), row


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(EXACT), output=st.text(max_size=200) | st.sampled_from(["[" * 5000, "{}", "9" * 5000, "null"]))
def test_any_output_is_judged_without_an_error(name, output):
    skill = SKILLS[name]
    skill.check(skill.items("test", 1)[0], output)


def test_arithmetic_against_brute_force():
    for name in ("add", "subtract", "add3", "add-steps", "workout", "multiply", "compare", "operator", "story"):
        for item in SKILLS[name].items("train", 150):
            numbers = [int(x) for x in re.findall(r"\d+", item.prompt)]
            value = item.meta["value"]
            if name == "story":
                total = numbers[0]
                for sentence in item.prompt.split(".")[1:-1]:
                    n = int(re.findall(r"\d+", sentence)[0])
                    total += n if "gets" in sentence or "finds" in sentence else -n
                assert value == total >= 0
            elif name == "compare":
                assert value == (max if "larger" in item.prompt else min)(numbers)
            else:
                a, b = numbers[:2]
                right = {"subtract": a - b, "multiply": a * b, "operator": a + 2 * b}.get(name, a + b)
                assert value == right, item
            for left, op, second, result in re.findall(r"(\d+)([+*-])(\d+)=(\d+)(?![+*-])", item.answer):
                if "c" not in item.answer:  # column steps carry a third summand
                    assert {"+": add, "-": sub, "*": mul}[op](int(left), int(second)) == int(result), item.answer


def test_procedures_against_python():
    work = {"copy": list, "reverse": lambda x: x[::-1], "sort": sorted, "rotate": lambda x: x[1:] + x[:1],
            "upper": lambda x: [c.upper() for c in x], "swap": lambda x: [x[-1], *x[1:-1], x[0]],
            "shift": lambda x: [chr((ord(c) - 97 + 1) % 26 + 97) for c in x]}  # fmt: skip
    for name, f in work.items():
        for item in SKILLS[name].items("test", 100):
            words = re.sub(r"[=:?]", " ", item.prompt).split()
            own = ("write", "again", "what", "stands", "in", "backwards", "is", "reverse", "order", "alphabetical", "put",
                   "move", "the", "first", "of", "to", "end", "capitals", "Q", "A", name)  # fmt: skip
            letters = [w for w in words if w not in own and w.lower() not in own]
            assert item.answer.split() == list(f(letters)), item
    for item in SKILLS["stack"].items("test", 100):
        held = []
        words = iter(item.prompt.removeprefix("stack: ").removesuffix(" =").split())
        for word in words:
            held.pop() if word == "pop" else held.append(next(words))
        assert item.answer.split() == (held or ["empty"])


def reading(context):
    """'k7 b3' or 'cup red door blue' as a dictionary."""
    words = context.split()
    if words[0][-1].isdigit():
        return {w[0]: w[1] for w in words}
    return dict(zip(words[::2], words[1::2], strict=True))


def test_recall_and_tracking_against_a_reading_of_the_context():
    for item in SKILLS["keys"].items("test", 100):
        context, asked = item.prompt.removeprefix("map: ").split(" | ")
        assert reading(context)[asked] == item.answer.strip()
    for item in SKILLS["boxes"].items("test", 100):
        where = dict(re.findall(r"(\w+) ([A-F])[,.]", item.prompt.split(".")[0] + "."))
        where |= dict(re.findall(r"Move (\w+) ([A-F])\.", item.prompt))
        assert where[re.findall(r"(?:the|Now:) (\w+)(?:\?|$)", item.prompt)[0]] == item.answer.strip()
    for item in SKILLS["notes"].items("test", 100):
        told = dict(re.findall(r"(\w+) (\w+)[,.]", item.prompt.split("\n")[0].removeprefix("Note: ")))
        question = item.prompt.split("\n", 1)[1]
        assert [c for t, c in told.items() if re.search(rf"\b{t}\b", question)] == [item.answer.strip()]


def test_every_fact_is_told_in_training_and_asked_in_a_phrasing_not_trained():
    for name in ("people", "places", "strangers", "newcomers"):
        told: dict = {}
        for item in SKILLS[name].items("train", 10_000):
            key = (item.meta["about"], item.meta["attribute"])
            told.setdefault(key, []).append(item.meta["phrasing"])
            assert item.meta["value"] == people.fact(*key)
        tests = SKILLS[name].items("test", 10_000)
        assert len(tests) == len(told)
        for item in tests:
            phrasings = told[item.meta["about"], item.meta["attribute"]]
            assert len(phrasings) == 4 and item.meta["phrasing"] not in phrasings
    everyone = people.PEOPLE + people.NEWCOMERS + people.STRANGERS
    assert len(dict.fromkeys(everyone)) == len(everyone) == 190


def test_dense_documents_are_right_and_keep_to_the_training_split():
    from temperament.bases.corpus import document

    draw = Draw("dense test")
    for name in ("keys", "notes", "boxes"):
        for _ in range(50):
            parts, end = document(name, draw, dense=True)
            assert end == "</s>" and sum(answer for _, answer in parts) >= 2
            context = parts[0][0]
            assert all(answer.endswith("</s>") for answer, is_answer in parts[:-1] if is_answer) and "</s>" not in parts[-1][0]
            key = context[6:] if name == "notes" else context
            assert split_of(name, key) == "train"
            if name == "keys":
                told = reading(context.removeprefix("map: "))
                for (ask, _), (answer, _) in zip(parts[1::2], parts[2::2], strict=True):
                    assert told[ask.removeprefix(" | ")] == answer.removesuffix("</s>").strip()


def test_held_out_text_is_not_in_the_training_text():
    test, train = text.frozen("test"), text.frozen("train")
    assert len(test) > 300 and len(train) > 300
    assert not dict.fromkeys(test).keys() & dict.fromkeys(train).keys()
    assert not dict.fromkeys(test).keys() & dict.fromkeys(text.training_text()).keys()
    assert sum(len(t) + 1 for t in test + train) < 200_000


def test_ngrams_are_a_distribution():
    draw = Draw("ngrams")
    rows = [[draw.below(6) for _ in range(30)] for _ in range(20)]
    model = text.NGrams(rows, vocabulary=7, order=3)
    for history in ((), (1,), (2, 3), (6, 6)):
        assert sum(model.probability(t, history) for t in range(7)) == pytest.approx(1.0)


def test_near_and_far_divide_what_a_base_knows():
    for target in worlds.targets():
        near, far = worlds.near_and_far(target)
        assert sorted(near + far) == sorted(worlds.known("lm")) and near
        assert SKILLS[target].role == "target" and not SKILLS[target].known_by
    assert SKILLS["reverse"].distance_to["shift"] == "near"
    assert SKILLS["stack"].distance_to["shift"] == "middle"
    assert SKILLS["people"].distance_to["shift"] == "far"
    with pytest.raises(UserError, match="shift"):
        worlds.near_and_far("shfit")
    with pytest.raises(UserError, match="reverse"):
        worlds.skill("revers")


def test_rows_in_three_forms(tmp_path):
    shift = SKILLS["shift"]
    assert worlds.write_jsonl(shift, tmp_path / "a.jsonl", 7) == 7
    row = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    item = shift.items("train", 1)[0]
    assert row == {"prompt": item.prompt, "completion": item.answer}
    worlds.write_jsonl(SKILLS["json"], tmp_path / "b.jsonl", 20, form="messages")
    for line in (tmp_path / "b.jsonl").read_text().splitlines():
        turns = json.loads(line)["messages"]
        assert [t["role"] for t in turns][-2:] == ["user", "assistant"]
    assert worlds.write_jsonl(SKILLS["places"], tmp_path / "c.jsonl", 10_000, "test") == 108


def test_draws_are_fair_and_samples_without_repetition():
    draw = Draw("fair")
    counts = [0] * 6
    for _ in range(6000):
        counts[draw.below(6)] += 1
    assert max(counts) < 1150 and min(counts) > 850
    for _ in range(100):
        assert len(dict.fromkeys(draw.sample("abcdef", 4))) == 4
    assert {draw.between(3, 5) for _ in range(100)} == {3, 4, 5}
    share = sum(split_of("x", i) == "test" for i in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_same_text_ignores_spacing_only():
    item = Item("x/test/0", "copy", "copy: a b =", " a b")
    assert same_text(None, item.answer, "a   b\n") and not same_text(None, item.answer, "ab")
    assert procedures.shift("xyz") == ["y", "z", "a"] and len(recall.OBJECTS) == 12
