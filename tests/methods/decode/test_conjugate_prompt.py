"""Conjugate prompting: the way back is the way back, and a whole system is asked in the other form."""

from __future__ import annotations

import json
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temperament.bases import worlds
from temperament.engine.measure import Question, System, TextSkill
from temperament.errors import UserError
from temperament.methods.decode.conjugate_prompt import FORMS, ConjugatePrompt
from temperament.parts import build

REWRITE = [[r"reverse:(.*) =", r"Write\1 backwards:"]]


@pytest.mark.parametrize("form", FORMS)
@given(text=st.text())
def test_the_way_back_is_the_way_back(form, text):
    part = ConjugatePrompt(form=form)
    assert part.hear(part.tell(text)) == text == part.tell(part.hear(text))
    assert part.ask([{"role": "system", "content": text}, {"role": "user", "content": text}]) == [
        {"role": "system", "content": text},
        {"role": "user", "content": part.tell(text)},
    ]


def test_forms_are_those_that_can_be_asked_for():
    assert set(get_args(get_type_hints(ConjugatePrompt)["form"])) == set(FORMS)
    assert FORMS["leetspeak"] and ConjugatePrompt(form="leetspeak").ask("test") == "7357"


def test_the_first_phrasing_that_fits_the_whole_prompt():
    part = ConjugatePrompt(rewrite=[*REWRITE, [".*", "never"]])
    assert (
        part.ask("reverse: a b =") == "Write a b backwards:"
        and ConjugatePrompt(rewrite=REWRITE).ask("reverse: a b") == "reverse: a b"
    )
    for bad in ({"rewrite": [["("]]}, {"rewrite": [["(", "x"]]}, {"form": "latin"}):
        with pytest.raises(UserError):
            build({"decode.conjugate_prompt": bad})


def test_a_system_is_asked_in_the_other_form_and_heard_in_this():
    """Its likelihood is that of the answer it must write; its answer is what the model wrote, translated back."""
    from temperament.bases.load import load

    base = load("lab/lm")
    items = worlds.skill("reverse").items("test", 12)
    asked = [i for i in items if i.prompt.startswith("reverse:")][:4]
    skill = lambda prompt, said: TextSkill(
        "r", tuple(Question(i.id, prompt(i.prompt), said(i.answer), lambda o: 0.0) for i in asked)
    )
    part = ConjugatePrompt(REWRITE, "swapcase")
    through = skill(str, str).measure(System(base, [part]))
    by_hand = skill(part.ask, part.tell).measure(System(base))
    assert [o.nll for o in through] == [o.nll for o in by_hand]
    assert [o.output for o in through] == [part.hear(o.output) for o in by_hand]
    assert json.dumps([o.prompt for o in through]) == json.dumps([i.prompt for i in asked])
