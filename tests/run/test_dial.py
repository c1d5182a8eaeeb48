"""The dial's choice."""

from types import SimpleNamespace

from temperament.run.dial import Some, choose


def skill(name, role, **how):
    made = SimpleNamespace(name=name, role=role, how=how)
    made.some = lambda n: made
    return made


def test_of_nats_less_is_more():
    """A target of natural text is better the lower; beside one in points both count upwards."""
    text = skill("text", "target", higher_is_better=False, unit="nats")
    some = Some(SimpleNamespace(skills=[text, skill("copy", "retained")]), 4)
    zero = {"text": 4.0, "copy": 1.0}
    points = [
        {"strength": s, **some.summary({"text": nll, "copy": 1.0}, zero)} for s, nll in ((0.0, 4.0), (0.5, 1.0), (1.0, 2.0))
    ]
    assert choose(points, 0.5)["strength"] == 0.5
    assert [p["target_change"] for p in points] == [0.0, 300.0, 200.0] and points[1]["target"] == 1.0
    both = Some(SimpleNamespace(skills=[text, skill("add", "target")]), 4)
    assert both.worth({"text": 1.0, "add": 0.5}) == -0.25


def test_a_number_of_the_whole_set_is_that_number():
    """A distance between pictures has no score an item: swept and watched it is what the ledger says, not 0."""
    seen = [SimpleNamespace(score=None, extra={}, prompt="", at=float(i)) for i in range(4)]
    far = skill("kid", "target", higher_is_better=False, unit="MMD")
    far.measure = lambda system: seen
    far.of_set = lambda outcomes: lambda rows: sum(outcomes[i].at for i in rows) / len(rows)
    some = Some(SimpleNamespace(skills=[far], system=lambda graded: None), 4)
    assert some.values() == {"kid": 1.5}


def test_what_is_painted_stays_with_the_point():
    """Two pictures of a target, one of each other skill; scores without pictures keep none."""
    outcome = lambda name, i, **extra: SimpleNamespace(prompt=f"{name} {i}", score=1.0, extra=extra)

    def made(name, role, paints):
        s = skill(name, role)
        s.measure = lambda system: [outcome(name, i, **({"image": f"{name}{i}"} if paints else {})) for i in range(3)]
        return s

    skills = [made("reward", "target", True), made("disc", "retained", True), made("text", "retained", False)]
    some = Some(SimpleNamespace(skills=skills, system=lambda graded: None), 3)
    assert some.values() == {"reward": 1.0, "disc": 1.0, "text": 1.0}
    assert [(p["caption"], p["image"]) for p in some.painted] == [
        ("reward 0", "reward0"), ("reward 1", "reward1"), ("disc 0", "disc0")]  # fmt: skip
