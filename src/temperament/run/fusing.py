"""Models of different origin made one new model, perhaps wider: `temper merge` with a method that fuses. Held in memory.

merge(["models/a", "models/b"], "models/ab", method={"merge.pleas": {"apart": 0.2}})
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from temperament import parts
from temperament.bases.load import DTYPES, Base, load
from temperament.delta.certificate import certify
from temperament.delta.files import atomic_folder, write_json
from temperament.errors import UserError, WorkFailed, nearest
from temperament.nn import draws
from temperament.protocols import Merge


def fuse(
    models: Sequence[str],
    out: str | Path,
    *,
    method: Any,
    as_: str = "merged",
    dtype: str | None = None,
    overwrite: bool = False,
    certificate: bool = True,
) -> dict[str, Any]:
    """See run.merging.merge. Models must be of one architecture and vocabulary; they need no common base."""
    built = parts.build(method, Merge, "--method")
    name = type(built).part_name
    models = [models] if isinstance(models, str | Path) else [str(m) for m in models]
    built.check(len(models))
    if as_ != "merged":
        raise UserError("--as", as_, f"{name} makes a new model, no change of a base; use merged")
    if dtype is not None and dtype not in DTYPES:
        raise UserError("dtype", dtype, nearest(dtype, DTYPES))
    loaded = [load(m, field="model") for m in models]
    _one_vocabulary(loaded)
    modules = [b.model for b in loaded]
    made = built.fuse(modules, built.inputs(loaded[0], modules)).to(DTYPES[dtype or "fp32"])
    record = {"method": parts.plain(built), "base": None, "models": models}
    with atomic_folder(out, overwrite) as new:
        made.save_pretrained(new, safe_serialization=True)
        if loaded[0].tokenizer is not None:
            loaded[0].tokenizer.save_pretrained(new)
        write_json(new / "merge.json", record)
        (new / "README.md").write_text(_card(built, record), encoding="utf-8")
    done = {"out": str(out), "as": as_, **record, "parameters": sum(p.numel() for p in made.parameters())}
    if certificate:
        done["certificate"] = _certified(made, loaded[0], Path(out))
    return done


def _one_vocabulary(loaded: Sequence[Base]) -> None:
    read = [(b.id, set(b.tokenizer.get_vocab().items())) for b in loaded if b.tokenizer is not None]
    for (one, tokens), (other, theirs) in pairwise(read):
        if odd := sorted(tokens ^ theirs):
            mend = f"{one} and {other} do not name it by the same number; merge models of one tokenizer"
            raise UserError("vocabulary", odd[0][0], mend)


def _card(built: Any, record: dict[str, Any]) -> str:
    summary = (type(built).__doc__ or "").strip().split("\n")[0]
    shown = yaml.safe_dump(record["method"], sort_keys=False, default_flow_style=None).strip()
    listed = "\n".join(f"- `{m}`" for m in record["models"])
    front = "---\nlibrary_name: transformers\ntags: [merge, temperament]\n---"
    named = f"**{type(built).part_name}**: {summary}"
    return f"{front}\n\nA merge made with temperament.\n\n{listed}\n\n{named}\n\n```yaml\n{shown}\n```\n"


def _certified(made: torch.nn.Module, first: Base, folder: Path) -> dict[str, Any]:
    at = torch.arange(2)[:, None], torch.arange(24)[None]
    inputs = {"input_ids": draws.randint(made.config.get_text_config().vocab_size, 0, "certificate", 0, *at)}
    with torch.no_grad():
        expected = made(**inputs).logits
    certificate = certify(folder, inputs, expected, live=made, processor=first.tokenizer, model_class=_auto(made))
    write_json(folder / "certificate.json", certificate)
    if not certificate["passed"]:
        why = ", ".join(certificate["failures"])
        raise WorkFailed(
            f"{folder} was written, but loaded in a fresh process it differs from the merge ({why}); do not use it."
        )
    return certificate


def _auto(model: torch.nn.Module) -> str:
    import transformers

    from temperament.bases.load import _model_class

    return _model_class(model.config, transformers)[0].__name__
