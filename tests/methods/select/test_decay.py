"""Weight decay pulls on weights alone, whichever selection trains them."""

import pytest
from tiny import context, tiny

from temperament import parts


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "clip"])
def test_one_rule_for_every_selection(name):
    base = tiny(name)
    places, norms = base.places.parameters(), {p.name for p in base.places if p.category == "norm"}
    of = lambda select: {p.name: p.decay for p in parts.build(select).build(base, context(base)).params}
    full, half = of("select.full"), of({"select.half": {"share": 1.0}})
    assert full == {n: not (n.endswith("bias") or places[n][0].name in norms) for n in full}
    assert half == full
