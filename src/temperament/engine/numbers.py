"""Numbers in texts, as judges and rewards read them: parsed, never evaluated."""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The last number of a text, commas between its digits apart; None where there is none, or one too long to be meant."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found and len(found[-1]) < 40 else None
