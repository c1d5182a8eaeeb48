"""Options of merges within their range, whatever their form: a number, one a model, a gradient over depth, rules by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def numbers(setting: Any) -> Iterator[Any]:
    if isinstance(setting, Mapping):
        yield from numbers(setting.get("value"))
    elif isinstance(setting, list | tuple):
        for one in setting:
            yield from numbers(one)
    else:
        yield setting


def finite(**options: Any) -> None:
    """ValueError unless every number of every option is one."""
    for name, setting in options.items():
        for value in numbers(setting):
            try:
                fine = math.isfinite(float(value))
            except (TypeError, ValueError):
                raise ValueError(f"{name} must be a number, not {value!r}") from None
            if not fine:
                raise ValueError(f"{name} must be finite, not {value}")


def within(least: float, most: float, low: bool = True, high: bool = True, **options: Any) -> None:
    """ValueError unless every number lies between; low, high: the ends belong to it."""
    finite(**options)
    for name, setting in options.items():
        for value in map(float, numbers(setting)):
            if not (least <= value <= most) or (value == least and not low) or (value == most and not high):
                ends = f"{'[' if low else '('}{least}, {most}{']' if high else ')'}"
                raise ValueError(f"{name} lies in {ends}, not {value}")


def shares(**options: Any) -> None:
    """Of what is kept: in (0, 1]; 0 of some models, layers or names, but not of all."""
    within(0, 1, **options)
    for name, setting in options.items():
        if not any(map(float, numbers(setting))):
            raise ValueError(f"{name} lies in (0, 1]; 0 keeps nothing of any change")
