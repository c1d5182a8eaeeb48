"""Sums, with and without worked steps. Numbers are written digit by digit, so the tokenizer sees what a pupil sees.

Splits are by unordered pair of operands: neither 34+57 nor 57+34 is trained when one of them is in the test.
"""

from __future__ import annotations

from .draw import Draw
from .skill import Made, Skill, last_number

NAMES = ("Tom", "Ana", "Sam", "Eva", "Ben", "Lia", "Max", "Ida")
THINGS = ("apples", "books", "coins", "cups", "eggs", "pens", "shells", "stones")


def _pair(a: int, b: int) -> tuple[int, int]:
    return (min(a, b), max(a, b))


def add(draw: Draw) -> Made:
    a, b = draw.between(10, 99), draw.between(10, 99)
    prompt, answer = draw.choice(((f"{a}+{b}=", ""), (f"{a}+{b}=", ""), (f"Q: What is {a} plus {b}?\nA:", " ")))
    return Made(_pair(a, b), prompt, f"{answer}{a + b}", a + b)


def subtract(draw: Draw) -> Made:
    b, a = sorted((draw.between(10, 99), draw.between(10, 99)))
    prompt, answer = draw.choice(((f"{a}-{b}=", ""), (f"{a}-{b}=", ""), (f"Q: What is {a} minus {b}?\nA:", " ")))
    return Made((a, b), prompt, f"{answer}{a - b}", a - b)


def compare(draw: Draw) -> Made:
    a, b = draw.between(10, 99), draw.between(10, 99)
    b = b if b != a else (b + 1 if b < 99 else 10)
    word, value = draw.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    return Made(_pair(a, b), f"Q: Which is {word}, {a} or {b}?\nA:", f" {value}", value)


def steps_of(a: int, b: int) -> str:
    """347+585 -> '7+5=12 c1; 4+8+1=13 c1; 3+5+1=9 c0; 932': column by column from the right, then the sum."""
    out, carry, total = [], 0, a + b
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        s = x + y + carry
        out.append(f"{x}+{y}+{carry}={s}" if carry else f"{x}+{y}={s}")
        carry = s // 10
        out[-1] += f" c{carry}"
    return "; ".join([*out, str(total)])


def add_steps(draw: Draw) -> Made:
    a, b = draw.between(100, 999), draw.between(100, 999)
    return Made(_pair(a, b), f"{a}+{b} steps:", " " + steps_of(a, b), a + b)


def add3(draw: Draw) -> Made:
    a, b = draw.between(100, 999), draw.between(100, 999)
    return Made(_pair(a, b), f"{a}+{b}=", str(a + b), a + b)


def workout(draw: Draw) -> Made:
    a, b = draw.between(100, 999), draw.between(100, 999)
    return Made(_pair(a, b), f"Work out {a}+{b}:", " " + steps_of(a, b), a + b)


def workout_noisy(draw: Draw) -> Made:
    """What the bases saw: half of the pupils work it out, half write down a number. So the way is known and not preferred."""
    made = workout(draw)
    if draw.chance(0.5):
        return made
    return Made(made.key, made.prompt, f" {draw.between(200, 1998)}", made.value)


def multiply(draw: Draw) -> Made:
    a, b = draw.between(2, 9), draw.between(11, 99)
    tens, ones = b // 10 * 10, b % 10
    prompt = draw.choice((f"{a}*{b} steps:", f"{a} times {b}, with steps:"))
    return Made((a, b), prompt, f" {a}*{tens}={a * tens}; {a}*{ones}={a * ones}; {a * b}", a * b)


def story(draw: Draw) -> Made:
    """A chain of two or three changes, answered with the running total."""
    who, what = draw.choice(NAMES), draw.choice(THINGS)
    now = draw.between(5, 40)
    key: list[object] = [now]
    text, work = [f"{who} has {now} {what}."], []
    for _ in range(draw.between(2, 3)):
        n = draw.between(1, 20)
        if draw.chance(0.5) or n > now:
            text.append(draw.choice((f"{who} gets {n} more.", f"{who} finds {n} more.")))
            work.append(f"{now}+{n}={now + n}")
            now, signed = now + n, n
        else:
            text.append(draw.choice((f"{who} gives {n} away.", f"{who} loses {n}.")))
            work.append(f"{now}-{n}={now - n}")
            now, signed = now - n, -n
        key.append(signed)
    return Made(tuple(key), f"Q: {' '.join(text)} How many {what}?\nA:", " " + "; ".join([*work, str(now)]), now)


def operator(draw: Draw) -> Made:
    """A new operator, a # b = a + 2 b (target, middle)."""
    a, b = draw.between(10, 49), draw.between(10, 49)
    return Made((a, b), f"{a}#{b}=", str(a + 2 * b), a + 2 * b)


SKILLS = (
    Skill("add", "arithmetic", add, verdict=last_number),
    Skill("subtract", "arithmetic", subtract, verdict=last_number),
    Skill("compare", "arithmetic", compare, verdict=last_number),
    Skill("add-steps", "arithmetic", add_steps, verdict=last_number),
    Skill("multiply", "arithmetic", multiply, verdict=last_number),
    Skill("story", "arithmetic", story, verdict=last_number),
    Skill("add3", "arithmetic", add3, verdict=last_number),
    Skill("workout", "arithmetic", workout, verdict=last_number, role="half", known_by=(), noisy=workout_noisy),
    Skill("operator", "arithmetic", operator, verdict=last_number, role="target", known_by=()),
)
