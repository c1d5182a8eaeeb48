"""How numbers and foreign text are shown: one place for units, signs and hostile strings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MINUS = "−"
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def clean(x: Any, depth: int = 0) -> Any:
    """The same data with every string made visible: control, direction-changing and lone surrogate characters are spelt out
    (a completion may not reorder the page around it), and numbers that are not finite are None."""
    if isinstance(x, str):
        return _UNSEEN.sub(lambda m: f"⟨{ord(m[0]):02X}⟩", x)
    if isinstance(x, bool) or x is None or isinstance(x, int):
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if depth > 40:
        return "..."
    if isinstance(x, Mapping):
        return {str(clean(str(k))): clean(v, depth + 1) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [clean(v, depth + 1) for v in x]
    return clean(float(x)) if hasattr(x, "__float__") else clean(str(x))


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def clip(text: Any, most: int) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def name(x: Any) -> str:
    """A name short enough for a label."""
    text = str(x)
    return text if len(text) <= 64 else text[:60] + " …"


def digits(x: float) -> str:
    """A short plain number: three significant digits, no exponent between 0.001 and a million."""
    if x == 0:
        return "0"
    if abs(x) >= 1e6 or abs(x) < 1e-3:
        mantissa, exponent = f"{x:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    return f"{x:,.0f}".replace("-", MINUS) if abs(x) >= 100 else f"{x:.3g}".replace("-", MINUS)


def level(x: float | None, unit: str = "points") -> str:
    if x is None:
        return "–"
    if unit == "points":
        return f"{_short(100 * x)} %"
    text = f"{x:#.3g}".replace("-", MINUS) if 0.01 <= abs(x) < 100 else digits(x)  # 3.00 beside 3.01
    return text + (f" {unit}" if unit else "")


def signed(x: float | None, unit: str = "points") -> str:
    """+61 or −0.4; in points for shares."""
    if x is None:
        return "–"
    scaled = 100 * x if unit == "points" else x
    body = _short(abs(scaled)) if unit == "points" else digits(abs(scaled))
    return body if body in ("0", "0.0") else ("+" if scaled > 0 else MINUS) + body


def decimals(x: float) -> str:
    """+0.43: two decimals, for nats."""
    text = f"{x:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", MINUS)


def interval(ci: Any, unit: str = "points") -> str:
    return f"{signed(ci[0], unit)} to {signed(ci[1], unit)}" if ci and is_number(ci[0]) and is_number(ci[1]) else ""


def size(x: float | None) -> str:
    if not is_number(x):
        return "–"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(x) >= scale:
            return f"{x / scale:.3g} {unit}"
    return f"{x:.0f} B"


def duration(x: float | None) -> str:
    if not is_number(x):
        return "–"
    if x < 60:
        return f"{x:.2g} s" if x < 10 else f"{x:.0f} s"
    hours, rest = divmod(round(x), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def count(x: float | None) -> str:
    if not is_number(x):
        return "–"
    for unit, scale in (("billion", 1e9), ("million", 1e6)):
        if abs(x) >= scale:
            return f"{x / scale:.3g} {unit}"
    return f"{x:,.0f}"


def brief(x: float | None) -> str:
    """98.3 k, 1.8 M."""
    if not is_number(x):
        return "–"
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= scale:
            return f"{x / scale:.3g} {unit}"
    return f"{x:.0f}"


def _short(x: float) -> str:
    text = f"{x:.0f}" if abs(x) >= 10 or abs(x - round(x)) < 0.05 else f"{x:.1f}"
    return "0" if text in ("-0", "0.0", "-0.0") else text.replace("-", MINUS)


def picture(uri: Any) -> str | None:
    """A raster picture as a data: address, or nothing."""
    return uri if isinstance(uri, str) and RASTER.match(uri) else None


RASTER = re.compile(r"data:image/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+\Z")
