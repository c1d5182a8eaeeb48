"""Parts: one method is one frozen dataclass in one file, and this registry finds it.

    @part("select.half", papers=["012"])
    @dataclass(frozen=True)
    class Half:
        "Half fine-tuning: ..."
        share: float = 0.5

A part is named `room.name`. Nothing is imported until it is asked for: the index is read from the *text* of the files in
`methods/`, so `temper parts` lists three hundred methods without loading torch; third parties add parts by the entry point
group `temperament.parts`. In a recipe a part is its name, or its name with options:

    objective: objectives.preference.dpo
    trainable: {adapters.lora: {rank: 8}}

A field typed by one of the protocols (see `protocols.py`) is a *slot* that another part fills. Any float may be given as a
*schedule* where the part is read anew at each step: `beta: {schedules.linear: {start: 0.1, end: 0.5}}`; the loop replaces it by
its value of the moment (`at`), so no method knows about schedules. What a part checks of its numbers (`number`) is
checked of the numbers a schedule comes to when the part is built, not as training meets them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from temperament.errors import UserError, nearest

METHODS = Path(__file__).parent / "methods"
_DECLARED = re.compile(r'^@part\(\s*"([a-z0-9_.]+)"', re.M)
_FULL = re.compile(r'^@part\(\s*"([a-z0-9_.]+)"([^@]*?)\)[ \t]*\n(?:@[^\n]*\n)*class\s+(\w+)', re.M)


@dataclass(frozen=True)
class Card:
    """What `temper part NAME` shows; made from the class, never written by hand."""

    name: str
    room: str
    papers: tuple[str, ...]
    summary: str
    doc: str
    modalities: tuple[str, ...]
    declares: tuple[str, ...]
    options: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        keys = ("name", "room", "papers", "summary", "modalities", "declares", "options")
        return {k: list(v) if isinstance(v := getattr(self, k), tuple) else v for k in keys}


def part(
    name: str, *, papers: Iterable[str] = (), modalities: Iterable[str] = ("any",), declares: Iterable[str] = ()
) -> Callable:
    """Register a frozen dataclass as the part `room.name`.

    papers: catalogue numbers. declares: what checks and reports must know of it, out of "couples the batch",
    "approximate gradient", "adapts at test time", "tunes on development data".
    """

    def register(cls):
        if not (is_dataclass(cls) and cls.__dataclass_params__.frozen):
            raise TypeError(f"part {name!r} must be a frozen dataclass")
        if not (cls.__doc__ or "").strip() or cls.__doc__.startswith(cls.__name__ + "("):
            raise TypeError(f"part {name!r} needs a docstring: what it does, the formula, the source")
        cls.part_name, cls.part_papers = name, tuple(papers)
        cls.part_modalities, cls.part_declares = tuple(modalities), tuple(declares)
        return cls

    return register


# ---- finding ---------------------------------------------------------------------------------------------------------------


@functools.cache
def index() -> dict[str, str]:
    """Name -> "module:Class" of every part, found without importing any of them."""
    found: dict[str, str] = {}
    for path in sorted(METHODS.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "@part(" not in text:
            continue
        module = ".".join(("temperament", *path.relative_to(METHODS.parent).with_suffix("").parts))
        matches = _FULL.findall(text)
        assert len(matches) == len(_DECLARED.findall(text)), f"{path}: write @part(...) directly above its dataclass"
        for name, _, cls in matches:
            assert name not in found, f"part {name} is declared twice"
            found[name] = f"{module}:{cls}"
    for entry in importlib.metadata.entry_points(group="temperament.parts"):
        if entry.name in found:
            raise UserError(
                "entry point temperament.parts", entry.name, f"already a part of temperament; rename it in {entry.value}"
            )
        found[entry.name] = entry.value
    return found


def get(name: str, field: str = "part") -> type:
    """The class of a part. Raises UserError with the nearest names when there is none."""
    known = index()
    must_be(name, None, field)
    module, _, attribute = known[name].partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as problem:
        raise UserError(
            field, name, f"{known[name]} could not be loaded ({problem}); install what it needs, or remove the package"
        ) from problem
    if getattr(cls, "part_name", None) != name:
        raise UserError(field, name, f"{known[name]} does not register it; write @part({name!r}) above the class")
    return cls


def brief() -> dict[str, dict[str, Any]]:
    """Name -> {"summary", "papers"} of every part, read from the text of the files: nothing is imported."""
    told = {}
    for name, where in index().items():
        module, _, cls = where.partition(":")
        text = _text_of(module)
        head = next((m for m in _FULL.finditer(text) if m[1] == name), None)
        papers = re.search(r"papers\s*=\s*[\[(]([^\])]*)", head[2]) if head else None
        doc = re.search(rf'^class {re.escape(cls)}\b.*?:\s*\n\s+r?"""\s*(.+?)\s*(?:"""|$)', text, re.M) if head else None
        told[name] = {
            "summary": doc[1] if doc else "",
            "papers": re.findall(r"[\"']([^\"']+)[\"']", papers[1]) if papers else [],
        }
    return told


def _text_of(module: str) -> str:
    import importlib.util

    if module.startswith("temperament."):  # (finding a module's spec would import its packages)
        here = METHODS.parent / Path(*module.split(".")[1:]).with_suffix(".py")
        if here.exists():
            return here.read_text(encoding="utf-8")
    try:
        found = importlib.util.find_spec(module)
        return Path(found.origin).read_text(encoding="utf-8") if found and found.origin else ""
    except (ImportError, OSError, ValueError):
        return ""


def must_be(name: str, slot: Any, field: str) -> None:
    """Refuse a name that is no part, or none of this slot's rooms; without loading it."""
    if name not in index():
        mine = [n for room in getattr(slot, "rooms", ()) for n in names(room)]
        near = nearest(name, index())  # a near name of any room; else those that could stand here
        raise UserError(field, name, f"no such part; {nearest(name, mine) if mine and not near.startswith('did') else near}")
    _fits_room(name, slot, field)


def names(room: str | None = None) -> list[str]:
    return sorted(n for n in index() if room is None or n.startswith(room + "."))


def card(name: str) -> Card:
    cls = get(name)
    doc = (cls.__doc__ or "").strip()
    described = option_help(cls)
    options = {}
    for f, hint in _hints(cls).items():
        default = _default(f)
        options[f.name] = {
            "type": _shown(hint),
            "default": "(required)" if default is MISSING else plain(default),
            "help": described.get(f.name, ""),
        }
    return Card(name, name.rpartition(".")[0].split(".")[0], cls.part_papers, doc.split("\n")[0], doc,
                cls.part_modalities, cls.part_declares, options)  # fmt: skip


def option_help(cls: type) -> dict[str, str]:
    """The comment behind each field is its help: written once, where the field is."""
    import inspect

    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    return {m[1]: m[2].strip() for m in re.finditer(r"^\s+(\w+)\s*:[^#\n]*?#\s*(.+)$", source, re.M)}


def _shown(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", str(hint)).replace("NoneType", "None")


# ---- building --------------------------------------------------------------------------------------------------------------


def build(value: Any, slot: Any = None, field: str = "part") -> Any:
    """The part a recipe's value describes: "name", {name: {options}}, or an instance already built in Python.

    slot: the protocol it must fill; refused with a sentence when the room does not fit.
    """
    if hasattr(type(value), "part_name"):
        _fits(type(value), slot, field)
        return value
    if isinstance(value, str):
        name, options = value, {}
    elif isinstance(value, Mapping) and len(value) == 1 and isinstance(next(iter(value)), str):
        name, options = next(iter(value.items()))
        options = {} if options is None else options
    else:
        raise UserError(field, value, "write a part as its name or as {name: {option: value}}")
    must_be(name, slot, field)
    cls = get(name, field)
    _fits(cls, slot, field)
    return fill(cls, options, f"{field}.{name}", getattr(cls, "scheduled", getattr(slot, "scheduled", False)))


def fill(cls: type, options: Any, field: str, scheduled: bool | tuple[str, ...] = False) -> Any:
    """The dataclass `cls` from a mapping of its options: unknown keys, wrong types and missing values are refused by name.
    scheduled: may its numbers be schedules? All, none, or those of these names."""
    from temperament.protocols import Progress

    if not isinstance(options, Mapping):
        raise UserError(field, options, f"give a mapping of options ({', '.join(list(_named_hints(cls))[:8])})")
    hints, filled = _named_hints(cls), {}
    for key, given in options.items():
        if key not in hints:
            raise UserError(_under(field, key), given, f"no such key; {nearest(str(key), hints)}")
        filled[key] = coerce(
            given, hints[key][1], _under(field, key), scheduled if isinstance(scheduled, bool) else key in scheduled
        )
    for key, (f, _) in hints.items():
        if key not in filled and _default(f) is MISSING:
            raise UserError(f"{field}.{key}".lstrip("."), None, f"required: {option_help(cls).get(key) or 'give a value'}")
    moving: dict[str, Any] = {}  # numbers of one moment
    try:
        made = cls(**filled)
        for moment in _MOMENTS if scheduled else ():
            now = {key: at(value, Progress(*moment)) for key, value in filled.items()}
            if not (moving := {key: v for key, v in now.items() if v is not filled[key]}):
                break
            cls(**now)
    except (ValueError, TypeError) as problem:
        why = str(problem).rstrip(".") + ("; its schedule comes to this number" if moving else "")
        if len(moving) == 1:
            key, number = moving.popitem()
            raise UserError(_under(field, key), plain(number), why) from None
        raise _refused(why, {**options, **moving}, hints, field) from None
    return made


_LONG = 1_000_000  # steps: longer than any warm-up
_MOMENTS = [(_LONG * k // 20, _LONG + 1, 0.0, k) for k in range(21)]  # (step, total, epoch, round), end to end


def _refused(why: str, options: Mapping[str, Any], hints: Mapping[str, Any], field: str) -> UserError:
    """What a part's own check says: of the option it begins with, where it begins with one, else of all options."""
    first, _, rest = why.partition(" ")
    if first in hints and first in options and rest.startswith(("must", "is ", "lies", "has ")):
        return UserError(_under(field, first), plain(options[first]), why)
    return UserError(field or "recipe", plain(dict(options)), why)


def _under(field: str, key: Any) -> str:
    """How a sentence names a key that may be anything."""
    plainly = isinstance(key, str) and re.fullmatch(r"[\w.-]{1,60}", key)
    return f"{field}.{key}".lstrip(".") if plainly else f"{field or 'recipe'}[{str(key)[:60]!r}]"


def _named_hints(cls: type) -> dict[str, tuple[Any, Any]]:
    return {f.name: (f, hint) for f, hint in _hints(cls).items()}


def coerce(value: Any, hint: Any, field: str, scheduled: bool = False) -> Any:
    """`value` as the annotated type `hint`: slots become parts, everything else is checked strictly."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_slot(hint):
        return build(value, hint, field)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        slots = [a for a in args if a is not type(None) and _has_slot(a)]
        plain_types = [a for a in args if a is not type(None) and not _has_slot(a)]
        for a in plain_types:
            try:
                return coerce(value, a, field, scheduled)
            except UserError:
                if not slots and a is plain_types[-1]:
                    raise
        # A part, or parts by word ({Pairs: objectives...}): names of parts have a dot.
        words = isinstance(value, Mapping) and not any("." in str(k) for k in value)
        return coerce(value, next((a for a in slots if (typing.get_origin(a) is dict) == words), slots[0]), field, scheduled)
    if is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else fill(hint, value, field, scheduled)
    if origin is list or (origin is tuple and len(args) == 2 and args[1] is Ellipsis):
        if isinstance(value, (str, Mapping)) and _has_slot(args[0]):
            value = [value]  # one part where several may stand
        if not isinstance(value, (list, tuple)):
            raise UserError(field, value, "give a list")
        return origin(coerce(v, args[0], f"{field}[{i}]", scheduled) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(field, value, "give a mapping")
        return {coerce(k, args[0], f"{field} key"): coerce(v, args[1], f"{field}.{k}", scheduled) for k, v in value.items()}
    if hint is float and (
        isinstance(value, Mapping)
        or hasattr(type(value), "part_name")
        or (isinstance(value, str) and value.startswith("schedules."))
    ):
        from temperament.protocols import Schedule

        if not scheduled:
            raise UserError(field, value, "this number is read once and cannot follow a schedule; give a number")
        return build(value, Schedule, field)
    return _adapter(hint, field, value)


def _adapter(hint: Any, field: str, value: Any) -> Any:
    import math

    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
        # YAML has lists only; a tuple field takes one.
        out = adapter.validate_python(tuple(value) if typing.get_origin(hint) is tuple and isinstance(value, list) else value)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = "".join(
            f"[{p}]" if isinstance(p, int) else f".{p}"
            for p in first["loc"]
            if not str(p).startswith(("function", "constrained"))
        )
        raise UserError(field + where, first["input"], first["msg"][0].lower() + first["msg"][1:].rstrip(".")) from None
    if isinstance(out, float) and math.isnan(out):
        raise UserError(field, value, "give a number; nan is none")
    return out


def is_slot(hint: Any) -> bool:
    return isinstance(hint, type) and getattr(hint, "_is_protocol", False) and hasattr(hint, "rooms")


def _has_slot(hint: Any) -> bool:
    return is_slot(hint) or any(_has_slot(a) for a in typing.get_args(hint))


def _fits_room(name: str, slot: Any, field: str) -> None:
    if slot is not None and slot.rooms and not any(name.startswith(room + ".") for room in slot.rooms):
        mine = [n for room in slot.rooms for n in names(room)]
        raise UserError(
            field,
            name,
            f"this place takes a part of {' or '.join(slot.rooms)}; {nearest(name, mine) if mine else 'none is installed'}",
        )


def _fits(cls: type, slot: Any, field: str) -> None:
    if slot is None:
        return
    _fits_room(cls.part_name, slot, field)
    missing = [m for m in getattr(slot, "must", ()) if not hasattr(cls, m)]
    if missing:
        raise UserError(field, cls.part_name, f"it cannot fill this place: it has no {', '.join(missing)}")


def _hints(cls: type) -> dict[Any, Any]:
    import sys

    from temperament import protocols

    # Slots may be imported for type checkers only; names resolve against the protocols too.
    hints = typing.get_type_hints(cls, {**vars(protocols), **vars(sys.modules[cls.__module__])})
    return {f: hints[f.name] for f in fields(cls) if f.init and not f.name.startswith("_")}


def _default(f: Any) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else MISSING


# ---- reading ---------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """The recipe form of a part or value, every default visible: what the resolved recipe.yaml shows and artefacts hash."""
    if hasattr(type(value), "part_name"):
        options = {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.init and not f.name.startswith("_")}
        return {type(value).part_name: options} if options else type(value).part_name
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def at(value: Any, progress: Any) -> Any:
    """`value` with every schedule in it, however deep in its slots, replaced by its number at `progress`."""
    if hasattr(type(value), "part_name"):
        if type(value).part_name.startswith("schedules."):
            return float(value(progress))
        changed = {}
        for f in fields(value):
            if f.init and (new := at(old := getattr(value, f.name), progress)) is not old:
                changed[f.name] = new
        return replace(value, **changed) if changed else value
    if isinstance(value, (list, tuple)):
        new = [at(v, progress) for v in value]
        return type(value)(new) if any(a is not b for a, b in zip(new, value, strict=True)) else value
    if isinstance(value, Mapping):
        new = {k: at(v, progress) for k, v in value.items()}
        return new if any(new[k] is not value[k] for k in new) else value
    return value


def number(value: Any, otherwise: float) -> float:
    """What a part checks of a number of its own: the number; `otherwise` for None and for a schedule, whose numbers are checked
    one by one."""
    return value if isinstance(value, (int, float)) else otherwise


def walk(value: Any) -> Iterable[Any]:
    """Every part inside `value`, itself first."""
    if hasattr(type(value), "part_name"):
        yield value
        for f in fields(value):
            yield from walk(getattr(value, f.name))
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from walk(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from walk(v)
