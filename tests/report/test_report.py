"""The report: safe with hostile completions, bounded, balanced, offline, whatever is missing from the run."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
import fixtures

from temperament.report import charts, html, picture, read_run, render, show, svg, terminal, views
from temperament.report.items import differences, pick

VOID = {"meta", "input", "br", "img", "link", "hr"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(2)</script>",
    "</pre></article></main>",
    '"><img src=x onerror=alert(3)>',
    "{{ 7 * 7 }}{% for x in y %}",
    "javascript:alert(4)",
    "\u202eevil\u202c",
    "nul\x00bell\x07",
    "lone \ud800 surrogate",
    "]]>&amp;&#60;b&#62;",
    "![x](http://example.org/x.png) https://example.org",
    "日本語 العربية 👩‍🚀",
    "a" * 50_000,
    "'; DROP TABLE items; --",
    "<!-- x --!> <svg onload=a()>",
]
KEYS = "name skills before after change ci95 points strength target retained rows values matrix step loss cells layer kind"
PARTS = "ledger log items dial compare weights plan recipe certificate environment exceptions steps base delta cost"
LEAF = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=8)
NEST = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS.split(" ")), inner, max_size=4)


class Page(HTMLParser):
    """Checks that tags balance, and keeps what a browser would act on."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.attributes, self.ids, self.scripts = [], [], [], [], 0
        self.words = []
        self.feed(text)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, (tag, self.stack[-5:])
        self.stack.pop()

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("script", "style"):
            self.words.append(data)


def check(text):
    """What holds for every page: balanced, offline, one script and that one by hash, no handlers, unique ids."""
    assert len(text.encode()) < 3_000_000
    page = Page(text)
    assert page.tags.count("script") == 1 and page.tags.count("style") == 1
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "action", "xlink:href", "srcset", "data"):
            assert value.startswith(("#", "data:image/")), (tag, name, value)
    for word in re.findall(r"<style>(.*?)</style>", text, re.S)[0].split():
        assert "url(" not in word and "@import" not in word
    script = re.findall(r"<script>(.*?)</script>", text, re.S)[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in text
    assert len(page.ids) == len(set(page.ids))
    return page


@pytest.mark.parametrize("kind", fixtures.KINDS)
def test_every_kind_of_run(kind, tmp_path):
    run = fixtures.KINDS[kind]()
    json.dumps(run, allow_nan=False)
    path = render(run, tmp_path / "report.html")
    page = check(path.read_text("utf-8"))
    assert not list(tmp_path.glob("*.part"))
    for section, key in (
        ("dial", "dial"),
        ("items", "items"),
        ("compare", "compare"),
        ("recipe", "recipe"),
        ("curves", "log"),
    ):
        assert (section in page.ids) == (key in run), section
    assert ("matrix" in page.ids) == (kind == "continual")


@pytest.mark.parametrize(
    "run", [{}, {"status": "failed", "error": "no room"}, {"ledger": None, "log": None, "items": [], "dial": {}, "weights": []}]
)
def test_almost_nothing(run):
    check(html(run))


def hostile_run():
    run = fixtures.language()
    names = iter(HOSTILE * 1000)

    def spoil(x):
        if isinstance(x, dict):
            return {k: spoil(v) for k, v in x.items()}
        if isinstance(x, list):
            return [spoil(v) for v in x]
        return next(names) if isinstance(x, str) and x not in ("target", "retained", "kept", "lost", "gained", "points") else x

    run = spoil(run)
    run["items"] = {name: rows for name, rows in zip(HOSTILE, run["items"].values(), strict=False)}
    pictures = {"image_before": HOSTILE[0], "image_after": "data:image/svg+xml;base64,AAAA"}
    run["items"] = {name: [{**row, **pictures} for row in rows] for name, rows in run["items"].items()}
    run["dial"]["points"] = [
        {**p, "skills": dict(zip(HOSTILE, p["skills"].values(), strict=False))} for p in run["dial"]["points"]
    ]
    for line in run["log"]:
        line[HOSTILE[0]] = 1.0
    run["compare"] = {
        "points": [{"method": h, "gain": 0.1 * i, "loss": 0.1} for i, h in enumerate(HOSTILE)],
        "note": HOSTILE[1],
    }
    run["ledger"]["matrix"] = {
        "rows": HOSTILE[:3],
        "skills": HOSTILE[:2],
        "values": [[0.1, 0.2]] * 3,
        "learned": {HOSTILE[0]: HOSTILE[1]},
    }
    return run


def test_hostile_texts_are_only_text():
    text = html(hostile_run())
    page = check(text)
    shown = "".join(page.words)
    assert (
        "img src=x" in shown
        and "alert(1)" in shown
        and "{{ 7 * 7 }}" in shown
        and "49" not in re.findall(r"\{\{ 7.{0,9}", shown)
    )
    assert "\x00" not in text and "\u202e" not in text and "⟨202E⟩" in text and "⟨D800⟩" in text
    assert "svg+xml" not in text
    for name in ("compare", "skills", "matrix", "dial", "items", "curves", "recipe"):
        assert name in page.ids


@settings(max_examples=25, deadline=None)
@given(st.recursive(LEAF, NEST, max_leaves=12), st.sampled_from(PARTS.split(" ")))
def test_nonsense_never_raises_on_the_reader(value, key):
    """A damaged run.json costs a section, never the report."""
    check(html({key: value}))


def test_ten_thousand_items_stay_small_and_are_counted():
    long = "word " * 400
    states = ["kept"] * 7000 + ["lost"] * 1500 + ["gained"] * 1000 + ["missed"] * 500
    items = {
        "s": [
            {"id": str(i), "prompt": long, "expected": "<&>" * 100, "before": long, "after": long[::-1], "status": s}
            for i, s in enumerate(states)
        ]
    }
    text = html({"items": items, "log": [{"step": i, "loss": 1.0 / (i + 1), "kl": i % 7} for i in range(20_000)]})
    page = check(text)
    said = " ".join(" ".join(page.words).split())
    shown, total = re.search(r"Here are ([\d,]+) of ([\d,]+) items", said).groups()
    assert total == "10,000" and int(shown.replace(",", "")) == page.tags.count("article") > 50
    for state in ("lost", "gained", "kept", "missed"):
        assert re.search(rf"\d+ of [\d,]+ {state}", said)


def test_every_lost_item_is_shown_when_it_fits():
    rows = [{"prompt": str(i), "before": "a", "after": "b", "status": "lost" if i < 200 else "kept"} for i in range(9000)]
    picked = pick({"s": rows}, 1_300_000, 900)
    assert picked.shown["lost"] == 200 and picked.totals == {"lost": 200, "kept": 8800} and len(picked.items) <= 900


def test_what_the_targets_missed_comes_before_what_was_kept():
    of = lambda *states: [{"prompt": str(i), "before": "a", "after": "b", "status": s} for i, s in enumerate(states)]
    found = {"copy": of("kept", "missed", "lost"), "mine": of("kept", "missed", "gained", "missed")}
    picked = pick(found, 1_300_000, 900, targets={"mine"})
    order = [(i["skill"], i["status"]) for i in picked.items]
    assert order[:4] == [("copy", "lost"), ("mine", "missed"), ("mine", "missed"), ("mine", "gained")]
    assert order[-1] == ("copy", "missed") and picked.totals == {"lost": 1, "missed": 3, "gained": 1, "kept": 2}
    skill = lambda name, gain, seen: {"name": name, "role": "target", "before": 0.1, "after": 0.1 + gain, "seen": seen}
    ledger = {"skills": [skill("a", 0.5, "gained"), skill("b", 0.0, "none"), skill("c", 0.2, "gained")]}
    assert [r["name"] for r in views.skills(ledger)["groups"][0]["rows"]] == ["b", "a", "c"]


def test_pictures_stay_within_the_budget():
    uri = "data:image/png;base64," + "A" * 200_000
    rows = [{"id": str(i), "status": "lost", "image_before": uri, "image_after": uri} for i in range(40)]
    text = html({"items": {"colour": rows}})
    assert text.count(uri) < 80 and len(text) < 2_000_000
    assert "of 40" in " ".join(check(text).words)


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_differences_mark_and_never_change_the_text(a, b):
    a, b = show.clean(a), show.clean(b)
    for marked, text in zip(differences(a, b), (a, b), strict=True):
        page = Page(f"<pre>{marked}</pre>")
        assert "".join(page.words) == text.replace("\r", "\n") and set(page.tags) <= {"pre", "del", "ins"}


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_few_and_inside(low, span):
    span = max(span, 1e-6 * abs(low))  # an axis shorter than that is below what a label can tell
    found = svg.ticks(low, low + span)
    assert 1 <= len(found) <= 12 and all(low - span * 0.01 <= t <= low + span * 1.01 for t in found)
    assert found == sorted(found)


def test_thinning_keeps_ends_and_extremes():
    y = [0.0] * 5000
    y[1234], y[4000] = 9.0, -9.0
    xs, ys = svg.thin(list(range(5000)), y)
    assert len(xs) <= 240 and xs[0] == 0 and xs[-1] == 4999 and max(ys) == 9.0 and min(ys) == -9.0 and xs == sorted(xs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=12))
def test_front_by_brute_force(points):
    beaten = lambda p: any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)
    assert svg.front(points) == sorted({p for p in points if not beaten(p)})


@pytest.mark.parametrize("width", [24, 36, 50, 70, 100, 160])
def test_terminal_fits_any_width(width):
    ledger = fixtures.language()["ledger"]
    ledger["skills"][1]["name"] = "[bold]x[/] " + "long" * 12
    out = StringIO()
    Console(file=out, width=width).print(terminal.ledger(ledger, width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "▲" in out.getvalue() and "▼" in out.getvalue()
    assert "[bold]" in out.getvalue() or width < 36


def test_pictures_for_the_readme_are_valid_xml():
    ledger = fixtures.language()["ledger"]
    ledger["skills"][0]["name"] = HOSTILE[0]
    for text in (picture.compare_picture(fixtures.compare()["compare"]), picture.skills_picture(ledger)):
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg") and not [e for e in root.iter() if e.tag.endswith("script")]
        assert "prefers-color-scheme: dark" in text and text.count("http") == 1  # the namespace
    assert picture.compare_picture({}) is None and picture.skills_picture({}) is None


def test_read_run_gathers_a_folder(tmp_path):
    run = fixtures.language()
    (tmp_path / "run.json").write_text(json.dumps({k: run[k] for k in ("status", "base", "ledger", "cost")}))
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, run["log"])) + '\n{"step": 251, "lo')
    (tmp_path / "recipe.yaml").write_text(run["recipe"])
    (tmp_path / "items.json").write_text(json.dumps(run["items"]))
    found = read_run(tmp_path)
    assert len(found["log"]) == 250 and found["recipe"] == run["recipe"]
    assert {"skills", "items", "curves", "recipe"} <= set(check(html(found)).ids)


def test_equal_runs_give_equal_pages():
    assert html(fixtures.language()) == html(fixtures.language())


def test_verdict_and_numbers_are_on_top():
    words = " ".join(" ".join(check(html(fixtures.language())).words).split())
    assert words.index("+91") < words.index("Gained 91 points") < words.index("Gained and lost, skill by skill")
    assert "−94" in words and "near" in words and "no change seen" in words


def test_a_dial_of_two_shapes_is_two_pairs_of_curves():
    point = lambda shape, s, target, retained: {
        "shape": f"merge.{shape}",
        "strength": s,
        "target": target,
        "retained": retained,
        "retained_change": 100 * (retained - 0.9),
        "skills": {"shift": target},
    }
    straight = [point("linear", s, s, 0.9 - 0.4 * s) for s in (0.0, 0.5, 1.0)]
    lines = [point("lines", s, 0.3 + 0.6 * s, 0.8 - 0.1 * s) for s in (0.0, 0.5, 1.0)]
    one = charts.dial({"points": straight, "best": straight[1], "budget": 30})
    assert [e["name"] for e in one["legend"]] == ["target, %", "retained, %", "single skills"] and not any(
        r["shape"] for r in one["rows"]
    )
    both = charts.dial({"points": straight + lines, "best": lines[1], "budget": 30})
    assert both["chart"].count("<polyline") == 4 and len(both["legend"]) == 4 and len(both["rows"]) == 6
    assert [r["shape"] for r in both["rows"] if r["best"]] == ["lines"] and "0.5 (lines)" in both["said"]
    assert [r["moved"] for r in both["rows"]][3] == "\u221210", "against the base, not against the first of its shape"


def swept(strengths=(0.0, 0.5, 1.0, 1.5), size=16, rows=3):
    """A dial whose points carry pictures: one caption a row, redder with the strength."""
    image = lambda s, i: fixtures.png((int(80 + 100 * s), 40, 40), i, size)
    painted = lambda s: [{"skill": f"skill {i}", "caption": f"a <b>cross</b> {i}", "image": image(s, i)} for i in range(rows)]
    points = [{"shape": "merge.linear", "strength": s, "target": s / 2, "retained": 1 - s / 4, "pictures": painted(s)}
              for s in strengths]  # fmt: skip
    return {"points": points, "best": points[2], "budget": 5}


def test_the_dial_is_a_row_of_pictures():
    page = html(fixtures.diffusion() | {"dial": swept()})
    found = Page(page)
    shown = [a for t, a in zip(found.tags, found.attributes, strict=False) if t == "img"]
    assert page.count('alt="at strength') == 12 and len(shown) >= 12 and "a <b>cross" not in page
    row = [page.index(swept()["points"][k]["pictures"][0]["image"]) for k in range(4)]
    assert row == sorted(row) and page.count(", best</small>") == 3  # by strength, the best of each row marked
    without = html(fixtures.diffusion() | {"dial": swept() | {"points": [{**p, "pictures": []} for p in swept()["points"]]}})
    assert "at strength" not in without.partition('id="dial"')[2].partition("</section>")[0].replace("At strength", "")


def test_rows_of_the_dial_that_do_not_fit_are_left_out_whole():
    from temperament.report.extras import turned

    rows = turned(swept(rows=6), 10**9)
    cost = sum(len(c["image"]) for c in rows[0]["cells"])
    few = turned(swept(rows=6), int(2.5 * cost))
    assert len(rows) == 6 and 1 <= len(few) < 6 and all(len(r["cells"]) == 4 for r in few)
    assert turned(None, 9) == turned({"points": [{"strength": 1, "pictures": [{"image": "javascript:1"}, 3]}]}, 9**9) == []
