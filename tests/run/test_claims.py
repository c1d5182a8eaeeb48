"""Every record of a claim is what its rows say: nothing in it is written by hand."""

from __future__ import annotations

import json

import pytest

from temperament.run import claims

RECORDS = sorted(p for p in claims.files() if claims.result(p))


@pytest.mark.parametrize("paper", RECORDS)
def test_a_record_is_what_its_rows_say(paper):
    claim, found = claims.load(paper), claims.result(paper)
    assert [r["seed"] for r in found["rows"]] == list(claim.seeds) and len(claim.seeds) >= 3
    told = json.loads(json.dumps(claims.verdict(claim, found["rows"])))
    wrong = {k: (found.get(k), v) for k, v in told.items() if k not in ("why", "rows", "seconds") and found.get(k) != v}
    assert not wrong, wrong
