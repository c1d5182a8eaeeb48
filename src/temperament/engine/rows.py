"""Read rows: JSONL, JSON, CSV, TSV, Parquet, a folder of these, a `datasets` folder or hub id, a list of objects.

    rows = read_rows("train.jsonl")
    rows[0]          Completion(prompt="2+2=", completion="4", origin=train.jsonl, line 1)
    rows.shape       "completion": which of `examples.SHAPES`, decided by the columns most rows have
    rows.bad         with on_bad="skip": the rows left out, each with file, line and reason

A row that cannot be used stops the reading with one sentence, or is left out and listed; it is never mended silently. Nothing
here executes what it reads: no pickle, no dataset script, no YAML tag.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from temperament.engine.examples import COLUMNS, COMMON, SHAPES, Example, Origin, Unfit, question, to_example
from temperament.errors import Unusable, UserError, nearest

LONGEST_ROW = 64 << 20  # bytes; a longer line is not a row but a file without line ends
LINES, ARRAYS, TABLES, COLUMNAR = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"), (".parquet",)
SUFFIXES = (*LINES, *ARRAYS, *TABLES, *COLUMNAR)
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
GUESSES = {  # only to word a hint: columns people use for ours
    "prompt": ("question", "query", "input", "instruction", "problem", "source"),
    "completion": ("answer", "response", "output", "target", "solution"),
    "text": ("content", "document", "body", "sentence"),
    "chosen": ("preferred", "accepted", "winner"),
    "rejected": ("dispreferred", "loser"),
    "messages": ("conversation", "dialog", "dialogue", "chat"),
}


@dataclass(frozen=True)
class BadRow:
    origin: Origin
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass(frozen=True)
class Rows(Sequence):
    """The examples in the order of the file, the rows left out, and what the reader wants to say about them."""

    examples: tuple[Example, ...]
    shape: str
    columns: tuple[str, ...]
    bad: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


def read_rows(
    source: str | Path | Sequence[Mapping] | Any,
    split: str | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    shape: str | None = None,
    config: str | None = None,
) -> Rows:
    """`columns` renames: {"prompt": "question"} reads our `prompt` from the file's `question`. `limit` reads the first rows.
    `shape` overrides the detection; `split` chooses among the splits of a folder or data set, `config` a hub configuration."""
    if on_bad not in ("stop", "skip"):
        raise UserError("on_bad", on_bad, "say 'stop' or 'skip'")
    if limit is not None and limit < 1:
        raise UserError("limit", limit, "read at least one row")
    if shape is not None and shape not in SHAPES:
        raise UserError("shape", shape, nearest(shape, SHAPES))
    name = str(source) if isinstance(source, str | Path) else "rows"
    raw, bad, total = [], [], 0
    for origin, row in islice(_raw_rows(source, split, config), limit):
        total += 1
        if isinstance(row, Mapping):
            raw.append((origin, row))
        else:
            reason = row if isinstance(row, Unread) else f"it is a {type(row).__name__}, not an object with columns"
            bad.append(BadRow(origin, str(reason)))
    if not total:
        raise UserError("data", name, "the source has no rows; give at least one")
    stop = lambda: Unusable(
        str(bad[0].origin), "a row that cannot be used",
        f"{bad[0].reason} ({len(bad)} of {total} rows bad); mend it, or say on_bad: skip",
    )  # fmt: skip
    if not raw:
        raise stop()
    raw = _renamed(raw, columns or {}, name)
    found = Counter(k for _, row in raw for k, v in row.items() if v is not None)
    notes = []
    if shape is None:
        shape, notes = _detect(raw, found, name)
    examples = []
    for origin, row in raw:
        try:
            examples.append(to_example(row, shape, origin))
        except Unfit as e:
            bad.append(BadRow(origin, str(e)))
    bad.sort(key=lambda b: (b.origin.file, b.origin.line))
    if bad and (on_bad == "stop" or not examples):
        raise stop()
    return Rows(tuple(examples), shape, tuple(sorted(found)), tuple(bad), tuple(notes))


def fingerprint(source: str | Path) -> str:
    """sha256 of the content of a file, or of all files of a folder in the order of their names; of a hub id, of the id."""
    path, sha = Path(source).expanduser(), hashlib.sha256()
    if not path.exists():
        return hashlib.sha256(str(source).encode()).hexdigest()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        sha.update(f"{file.relative_to(path.parent).as_posix()}\n".encode())
        with file.open("rb") as f:
            sha.update(hashlib.file_digest(f, "sha256").digest())
    return sha.hexdigest()


def held_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(rows to train on, rows kept out of it), each in file order. share: below 1 a share, else a number of rows; 0: none.

    Who is kept out is decided by the hash of what is asked (prompt, conversation up to the last answer, text), so it does not
    depend on the order of the file, and no question stands on both sides: equal ones go together.
    """
    wanted = share if share >= 1 else share * len(examples)
    if not 0 <= wanted < len(examples) and examples:
        raise UserError("holdout", share, f"of {len(examples)} rows some must be left to train on; hold out fewer")
    wanted = 0 if share == 0 else max(round(wanted), 1)
    keys = [hashlib.sha256(question(e).encode("utf-8", "replace")).digest() for e in examples]
    out: set[bytes] = set()
    taken, sizes = 0, Counter(keys)
    for key in sorted(sizes):
        if taken >= wanted:
            break
        if taken + sizes[key] < len(examples):  # never all of them
            out.add(key)
            taken += sizes[key]
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example, key in zip(examples, keys, strict=True):
        sides[key in out].append(example)
    return sides


def _renamed(raw: list, columns: Mapping[str, str], name: str) -> list:
    if not columns:
        return raw
    there = {k for _, row in raw for k in row}
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise UserError(f"columns.{ours}", theirs, f"'{ours}' is no column that is read here; {nearest(ours, COLUMNS)}")
        if theirs not in there:
            raise UserError(f"columns.{ours}", theirs, f"{name} has no such column; {nearest(str(theirs), there)}")
    back = {theirs: ours for ours, theirs in columns.items()}
    if len(back) < len(columns):
        raise UserError("columns", dict(columns), "two of our columns are read from one of the file's")
    # A column of the file that already has the new name would be overwritten: it is put aside under "name (original)".
    rename = lambda k: back.get(k) or (f"{k} (original)" if k in columns else k)
    return [(origin, {rename(k): v for k, v in row.items()}) for origin, row in raw]


def _guessed(usual: set[str]) -> dict[str, str]:
    """Our columns as those of a file may be meant by their names, where they make no shape as they are called."""
    ours = [(k, t) for k, guesses in GUESSES.items() for t in guesses if t in usual and k not in usual]
    known = {"prompt": 0, "completion": 0} if {"prompt", "completion"} <= {k for k, _ in ours} | usual else dict(ours)
    return {k: next(t for o, t in ours if o == k) for k in known if any(o == k for o, _ in ours)}


def glance(source: str | Path, columns: Mapping[str, str] | None = None, limit: int = 200) -> tuple[str, dict[str, str]]:
    """(shape, columns) to read a file with, from its first rows: columns that make no shape are taken as their names say."""
    raw = [row for _, row in islice(_raw_rows(source, None, None), limit) if isinstance(row, Mapping)]
    found, columns = Counter(k for row in raw for k, v in row.items() if v is not None), dict(columns or {})
    usual = {k for k, n in found.items() if 2 * n >= len(raw)}
    if not columns and not any(s.fits(usual) for s in SHAPES.values()):
        columns = _guessed(usual)
    return read_rows(source, on_bad="skip", limit=limit, columns=columns).shape, columns


def _detect(raw: list, found: Counter, name: str) -> tuple[str, list[str]]:
    """The first shape that fits the columns at least half of the rows have: one row that lacks a column is then a bad row,
    not a change of shape."""
    usual = {k for k, n in found.items() if 2 * n >= len(raw)}
    fitting = [s for s, shape in SHAPES.items() if shape.fits(usual)]
    truths = {"messages", "label"} <= usual and all(isinstance(row.get("label"), bool | None) for _, row in raw)
    if truths and "judged" not in fitting:  # answers marked false must not be imitated because a column was overlooked
        fitting.insert(0, "judged")
    if not fitting:
        if hint := _guessed(usual):
            mend = "rename with columns: {" + ", ".join(f"{k}: {t}" for k, t in hint.items()) + "}"
        else:
            other = sorted(usual - set(COLUMNS))
            typed = [f"'{u}': {nearest(u, COLUMNS)}" for u in other if nearest(u, COLUMNS).startswith("did")]
            mend = "; ".join(typed) or "one of text, messages, prompt + completion, chosen + rejected is needed"
        raise UserError(f"columns of {name}", ", ".join(sorted(usual or found)), f"they make no known shape; {mend}")
    chosen = SHAPES[fitting[0]]
    taken = {c for n in (*chosen.needs, *chosen.takes, *COMMON) for c in (n if isinstance(n, tuple) else (n,))}
    rivals = [s for s in fitting[1:] if not {c for c in SHAPES[s].needs if isinstance(c, str)} <= taken]
    notes = [f"{name} is read as '{fitting[0]}'; its columns also make {', '.join(rivals)}: shape: chooses"] * bool(rivals)
    for unused in sorted(usual - taken - set(COLUMNS)):
        notes += [f"column '{unused}' is not read: did you mean '{c}'?" for c in get_close_matches(unused, COLUMNS, 1, 0.8)]
    return fitting[0], notes


# ---- from a source to raw rows: (origin, mapping), or (origin, Unread) where not even that can be had -----------------------


class Unread(str):
    """Why a line could not be turned into a row."""


def _raw_rows(source, split, config) -> Iterator[tuple[Origin, Any]]:
    if isinstance(source, str | Path):
        yield from _from_path(str(source), split, config)
    elif isinstance(source, Mapping):
        raise UserError("data", type(source).__name__, "give a path, a list of objects or a data set; of a dict of splits, one")
    elif isinstance(source, Sequence) or hasattr(source, "column_names"):
        for i, row in enumerate(source):
            yield Origin("rows", i + 1, "row"), row
    else:
        raise UserError("data", type(source).__name__, "give a path, a list of objects or a data set")


def _from_path(source: str, split, config) -> Iterator:
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _folder(path, split)
    elif path.exists():
        yield from _file(path)
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and _kind(path) is None and path.suffix not in PICKLES:
        yield from _hub(source, split, config)
    else:
        near = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        near = get_close_matches(path.name, near, n=2, cutoff=0.6)
        mend = "no such file or folder" if path.parent.is_dir() else f"there is no folder {path.parent}"
        if "://" in source:
            mend = "addresses are not fetched; download it and name the file"
        raise UserError("data", source, mend + ("; did you mean " + " or ".join(map(repr, near)) + "?" if near else ""))


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def _file(path: Path) -> Iterator:
    kind = _kind(path)
    if kind is None:
        what = "pickles are never opened" if path.suffix.lower() in PICKLES else "not a kind of file that is read"
        raise UserError("data", str(path), f"{what}; give {', '.join(SUFFIXES)}")
    try:
        if kind in COLUMNAR:
            yield from _parquet(path)
            return
        with (gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")) as f:
            yield from (_lines if kind in LINES else _array if kind in ARRAYS else _table)(path, f)
    except (OSError, EOFError) as e:
        raise UserError("data", str(path), f"it cannot be read ({e.strerror if getattr(e, 'strerror', None) else e})") from None


def _object(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise ValueError(f"'{twice}' occurs twice in one object")
    return row


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _why_not_json(e: Exception) -> Unread:
    if isinstance(e, json.JSONDecodeError):
        return Unread(f"not JSON: {e.msg} at column {e.colno}")
    return Unread("nested too deeply" if isinstance(e, RecursionError) else f"not usable JSON: {e}")


def _start(path: Path, head: bytes) -> None:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError("data", str(path), "it is UTF-16; save it as UTF-8")
    if head[:4] == b"PAR1" or head[:2] == b"\x1f\x8b" or head[:4] == b"PK\x03\x04":
        raise UserError("data", str(path), "it is a Parquet, gzip or zip file by its content; rename or unpack it")


def _lines(path: Path, f: IO[bytes]) -> Iterator:
    number = 0
    while line := f.readline(LONGEST_ROW + 1):
        number += 1
        origin = Origin(str(path), number)
        if number == 1:
            _start(path, line)
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > LONGEST_ROW:
            while line and not line.endswith(b"\n"):
                line = f.readline(LONGEST_ROW)
            yield origin, Unread(f"longer than {LONGEST_ROW >> 20} MiB")
            continue
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as e:
            yield origin, Unread(f"not UTF-8: byte 0x{line[e.start]:02x} at position {e.start + 1}")
            continue
        if "\ufeff" in text[:1]:
            yield origin, Unread("a byte order mark inside the file (were files joined?)")
            continue
        try:
            yield origin, _decoder.decode(text.strip())
        except (ValueError, RecursionError) as e:
            yield origin, _why_not_json(e)


def _array(path: Path, f: IO[bytes]) -> Iterator:
    """A list of objects; or, as many files with this name are, one object a line."""
    data = f.read()
    _start(path, data)
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.lstrip().startswith(b"["):
        first = data.lstrip().split(b"\n", 1)[0].strip()
        if first and not first.endswith(b"}"):
            raise UserError("data", str(path), "it is neither a JSON list of rows nor one object a line")
        yield from _lines(path, io.BytesIO(data))
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        line, byte = data.count(b"\n", 0, e.start) + 1, f"byte 0x{data[e.start]:02x}"
        raise Unusable(f"{path}, line {line}", byte, f"{byte} is not UTF-8; save the file as UTF-8") from None
    blank = re.compile(r"[ \t\r\n]*")
    at, line, counted = blank.match(text, text.index("[") + 1).end(), 1, 0
    first = True
    while True:  # item by item, so that each row knows its line
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            break
        if not first:
            if text[at : at + 1] != ",":
                here = text[at : at + 20]
                raise Unusable(f"{path}, line {line}", here, f"a comma or the end of the list belongs where {here!r} stands")
            at = blank.match(text, at + 1).end()
            line, counted = line + text.count("\n", counted, at), at
        first = False
        try:
            row, end = _decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            why = f"{e.msg}, line {e.lineno}" if isinstance(e, json.JSONDecodeError) else _why_not_json(e)
            raise Unusable(f"{path}, line {line}", text[at : at + 20], f"the row is not JSON ({why}); mend it") from None
        yield Origin(str(path), line), row
        at = blank.match(text, end).end()


def _table(path: Path, f: IO[bytes]) -> Iterator:
    _start(path, f.read(4))
    f.seek(0)
    # Bytes that are not UTF-8 become lone surrogates here, and the row that holds one is refused by name.
    text = io.TextIOWrapper(f, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(min(LONGEST_ROW, sys.maxsize))
    reader = csv.reader(text, delimiter="\t" if _kind(path) == ".tsv" else ",", strict=True)
    header, before = None, 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as e:
            raise Unusable(f"{path}, line {before + 1}", "not CSV", f"this is not CSV ({e}); close the quotes") from None
        if cells is None:
            return
        origin, before = Origin(str(path), before + 1), reader.line_num
        if not cells:
            continue
        if header is None:
            header = [c.strip() for c in cells]
            if len(set(header)) < len(header) or "" in header:
                raise UserError(f"columns of {path}", ", ".join(header), "the first line must give each column its own name")
        elif len(cells) != len(header):
            yield origin, Unread(f"has {len(cells)} fields where the first line names {len(header)}")
        else:
            yield origin, {k: (v if v != "" else None) for k, v in zip(header, cells, strict=True)}


def _parquet(path: Path) -> Iterator:
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("data", str(path), "Parquet needs pyarrow; pip install 'temperament[data]'") from None
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Origin(str(path), number, "row"), row
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        raise UserError("data", str(path), f"it is not readable Parquet ({str(e).splitlines()[0][:100]})") from None


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.as_posix().lower())
    return next((s for s, names in SPLITS.items() if any(n in words for n in names)), None)


def _folder(path: Path, split) -> Iterator:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        yield from _saved(path, split)
        return
    files = sorted(p for p in path.rglob("*") if _kind(p) and p.is_file() and not any(
        part.startswith((".", "_")) for part in p.relative_to(path).parts) and p.name != "dataset_info.json")  # fmt: skip
    if not files:
        raise UserError("data", str(path), f"the folder holds no file that is read here ({', '.join(SUFFIXES)})")
    kinds = {p: _split_of(p.relative_to(path)) for p in files}
    there = sorted({k for k in kinds.values() if k})
    if split is not None:
        files = [p for p in files if kinds[p] == split]
        if not files:
            raise UserError("split", split, f"{path} has {', '.join(there) or 'no files named after splits'}")
    elif len(set(kinds.values())) > 1:  # training on the test set by default is not a service
        unnamed = next((f" and files without a split in their names ({p.name})" for p in files if kinds[p] is None), "")
        raise UserError("split", "not given", f"{path} has {', '.join(there)}{unnamed}; choose one, or give the file")
    for p in files:
        yield from _file(p)


def _datasets(what: str):
    try:
        import datasets
    except ImportError:
        mend = "reading it needs the datasets library; pip install 'temperament[data]'"
        raise UserError("data", what, f"no such file; if it is a hub id, {mend}") from None
    return datasets


def _saved(path: Path, split) -> Iterator:
    try:
        data = _datasets(str(path)).load_from_disk(str(path))
    except UserError:
        raise
    except Exception as e:  # whatever the library raises on a damaged folder
        raise UserError("data", str(path), f"the data set cannot be opened ({str(e).splitlines()[0][:120]})") from None
    yield from _data_set(data, str(path), split)


def _hub(name: str, split, config) -> Iterator:
    library = _datasets(name)
    try:
        data = library.load_dataset(name, config, split=split)
    except Exception as e:  # network, authorisation, scripts: one sentence for all
        why = (str(e).splitlines() or [type(e).__name__])[0][:160]
        raise UserError("data", name, f"there is no such file, and as a hub id it cannot be loaded ({why})") from None
    yield from _data_set(data, name, split)


def _data_set(data, name: str, split) -> Iterator:
    if isinstance(data, Mapping):
        if split is None and len(data) > 1 and "train" not in data:
            raise UserError("split", "not given", f"{name} has {', '.join(data)}; choose one")
        key = split or ("train" if "train" in data else next(iter(data)))
        if key not in data:
            raise UserError("split", key, f"{name} has {', '.join(data)}")
        data = data[key]
    elif split is not None and str(data.split or split) != split:
        raise UserError("split", split, f"{name} is the split '{data.split}'")
    for i, row in enumerate(data):
        yield Origin(name, i + 1, "row"), row
