"""Side by side: contenders take turns, round by round, in one process; what is quoted is the median over rounds.

    laps = interleave({"floor": f, "temperament": ours, "peft": theirs}, rounds=15)
    result = Result("lora", "LoRA step", "ms a step", lower=True)
    result.add("d=128", laps)                          median, min, max, CPU time, ratio to the floor
    result.promise("excess ...", value, at_most=0.5)   what the project says it holds; printed, never asserted

A contender is a function that does its work once and returns None (its wall and CPU time are taken here), or a `Lap` it timed itself
(when only a part of what it does counts). Turns go forward in one round and backward in the next, so that drift of the machine's
speed falls on all alike; ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


@dataclass(frozen=True)
class Options:
    threads: int = 2  # of torch
    rounds: int = 0  # counted rounds; 0: each benchmark's own number
    quick: bool = False  # few rounds, small sizes: to see that it runs
    write: bool = True  # results/*.json and the table

    def turns(self, usual: int) -> int:
        return self.rounds or (2 if self.quick else usual)


@dataclass(frozen=True)
class Lap:
    """units of work done in so many seconds of wall clock and of CPU (all threads)."""

    wall: float
    cpu: float
    units: float = 1.0


class Watch:
    """with Watch() as w: ...; w.lap(units)"""

    def __enter__(self) -> Watch:
        self.start()
        return self

    def start(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu

    def lap(self, units: float = 1.0) -> Lap:
        return Lap(self.wall, self.cpu, units)


def timed(work: Callable[[], Any]) -> Lap:
    with Watch() as watch:
        lap = work()
    return lap if isinstance(lap, Lap) else watch.lap()


def interleave(contenders: dict[str, Callable[[], Any]], rounds: int, warm: int = 2) -> dict[str, list[Lap]]:
    """Laps of each contender, one a round; the first `warm` rounds are not counted."""
    laps: dict[str, list[Lap]] = {name: [] for name in contenders}
    for turn in range(warm + rounds):
        for name in contenders if turn % 2 else reversed(list(contenders)):
            lap = timed(contenders[name])
            if turn >= warm:
                laps[name].append(lap)
    return laps


def ratio(a: list[Lap], b: list[Lap], cpu: bool = False) -> float:
    """How many times as long as b a takes for a unit: the median over rounds."""
    cost = (lambda x: x.cpu / x.units) if cpu else (lambda x: x.wall / x.units)
    return statistics.median(cost(x) / cost(y) for x, y in zip(a, b, strict=True))


@dataclass
class Result:
    """One benchmark's figures. rate: units a second (more is better), else milliseconds for a unit (less is better)."""

    name: str
    title: str
    what: str
    unit: str
    rate: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    promises: list[dict[str, Any]] = field(default_factory=list)

    def add(self, setting: str, laps: dict[str, list[Lap]], floor: str | None = None, note: str = "") -> None:
        for name, of in laps.items():
            shown = [x.units / x.wall if self.rate else 1e3 * x.wall / x.units for x in of]
            cpu = [x.units / x.cpu if self.rate else 1e3 * x.cpu / x.units for x in of if x.cpu]
            row = {
                "setting": setting,
                "who": name,
                "median": statistics.median(shown),
                "min": min(shown),
                "max": max(shown),
                "rounds": len(of),
                "cpu": statistics.median(cpu) if cpu else None,
                "best_cpu": (max if self.rate else min)(cpu) if cpu else None,
                "over_floor": ratio(of, laps[floor]) if floor else None,
                "note": note,
            }
            self.rows.append(row)

    def promise(self, what: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        holds = value <= at_most if at_most is not None else value >= at_least
        self.promises.append({"what": what, "value": value, "at_most": at_most, "at_least": at_least, "holds": holds})

    def json(self, options: Options) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "what": self.what,
            "unit": self.unit,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": machine(options.threads),
            "rows": self.rows,
            "promises": self.promises,
        }


def machine(threads: int) -> dict[str, Any]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "threads": threads,
        "python": platform.python_version(),
        "system": platform.system(),
        "packages": found,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---- what is shown -----------------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one table a benchmark, then what was promised of it."""
    out = []
    for r in results:
        m = r["machine"]
        packages = ", ".join(f"{k} {v}" for k, v in m["packages"].items())
        out += [
            f"### {r['title']}",
            "",
            f"{r['what']} {m['processor']}, {m['threads']} threads; {packages}; {r['date']}.",
            "",
            f"| setting | who | median {r['unit']} | min | max | CPU | x floor |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in r["rows"]:
            over = "" if row["over_floor"] is None else f"{row['over_floor']:.2f}"
            cells = [row["setting"], row["who"], *(_number(row[k]) for k in ("median", "min", "max", "cpu")), over]
            out.append("| " + " | ".join(cells) + " |")
        out += ["", *(_said(p) for p in r["promises"]), ""]
    return "\n".join(out)


def _said(p: dict[str, Any]) -> str:
    bound = f"at most {_number(p['at_most'])}" if p["at_most"] is not None else f"at least {_number(p['at_least'])}"
    return f"- {p['what']}: **{_number(p['value'])}** ({bound}: {'holds' if p['holds'] else 'missed'})"


def _number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def write(result: Result, options: Options) -> dict[str, Any]:
    """results/NAME.json, and results/table.md of every result there is."""
    made = result.json(options)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{result.name}.json").write_text(json.dumps(made, indent=1) + "\n")
        known = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
        (RESULTS / "table.md").write_text(table([k for k in known if "rows" in k and "promises" in k]))
    return made
