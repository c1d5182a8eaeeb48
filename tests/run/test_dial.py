"""The dial's choice."""

from types import SimpleNamespace

from temperament.run.dial import _Some, choose


def skill(name, role, **how):
    made = SimpleNamespace(name=name, role=role, how=how)
    made.some = lambda n: made
    return made


def test_of_nats_less_is_more():
    """A target of natural text is better the lower; beside one in points both count upwards."""
    text = skill("text", "target", higher_is_better=False, unit="nats")
    some = _Some(SimpleNamespace(skills=[text, skill("copy", "retained")]), 4)
    zero = {"text": 4.0, "copy": 1.0}
    points = [
        {"strength": s, **some.summary({"text": nll, "copy": 1.0}, zero)} for s, nll in ((0.0, 4.0), (0.5, 1.0), (1.0, 2.0))
    ]
    assert choose(points, 0.5)["strength"] == 0.5
    assert [p["target_change"] for p in points] == [0.0, 300.0, 200.0] and points[1]["target"] == 1.0
    both = _Some(SimpleNamespace(skills=[text, skill("add", "target")]), 4)
    assert both.worth({"text": 1.0, "add": 0.5}) == -0.25
