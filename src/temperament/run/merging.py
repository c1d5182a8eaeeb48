"""`temper merge`: finished models made one. Folders are streamed block by block by all cores; memory does not grow with the
models.

    merge(["runs/a", "runs/b"], "models/ab", method={"merge.ties": {"density": 0.3}})
    merge("merge.yml", "models/ab")                                   a mergekit YAML as it is

Everything that can be known from headers is checked before anything is written; the folder appears whole or not at all; what
was written is loaded again in a fresh process and compared with the model computed here, ties and tokenizer included.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from temperament import parts
from temperament.bases.load import DTYPES, locate
from temperament.delta.files import atomic_folder, write_json
from temperament.delta.merge_run import unrounded
from temperament.delta.tensorfile import Writer
from temperament.errors import UserError, nearest
from temperament.protocols import Merge
from temperament.run import mergekit_yaml
from temperament.run.merge_certificate import certified
from temperament.run.merge_inputs import Input, named_base, open_input
from temperament.run.merge_plan import Plan, simple

# what a model folder holds beside its weights
FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
         "preprocessor_config.json", "processor_config.json", "image_processor*.json")  # fmt: skip


def merge(
    models: str | Path | Mapping | Sequence[str],
    out: str | Path,
    *,
    method: Any = "merge.linear",
    base: str | None = None,
    as_: str = "merged",
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
    threads: int | None = None,
    overwrite: bool = False,
    certificate: bool = True,
) -> dict[str, Any]:
    """Merge models into the folder `out`; returns what was made, and its certificate.

    models: runs, adapters, deltas, model folders, hub ids, `model+adapter`; or one mergekit YAML (a path or its content),
    which then
        says all else. base: what they were tuned from; runs and adapters say so themselves. as_: "merged" (a model folder),
        "adapter" or "delta" (of the base). dtype: fp32, bf16 or fp16; by default that of the base.
    """
    if as_ not in ("merged", "adapter", "delta"):
        raise UserError("--as", as_, nearest(as_, ("merged", "adapter", "delta")))
    if fuses(models, method):
        from temperament.run.fusing import fuse

        return fuse(models, out, method=method, as_=as_, dtype=dtype, overwrite=overwrite, certificate=certificate)
    plan = planned(models, method, base, dtype)
    if as_ != "merged":
        return _as_delta(plan, out, as_)
    began = time.perf_counter()
    with atomic_folder(out, overwrite) as new:
        with Writer(new, plan.table(), shard_bytes=shard_bytes) as writer:
            plan.carry_out(writer, threads)
        _beside(plan, new)
    done = {
        "out": str(out),
        "as": as_,
        "base": plan.base,
        "models": [i.spec for i in plan.inputs],
        "seconds": time.perf_counter() - began,
        "method": described(plan),
        "parameters": sum(e.numel for e in plan.table().values()),
    }
    if certificate:
        done["certificate"] = certified(plan, Path(out), threads)
    return done


def fuses(models: Any, method: Any) -> bool:
    """Does the method make a new model of several of any origin, rather than a change of their base?"""
    document = isinstance(models, Mapping) or str(models).endswith((".yml", ".yaml"))
    return not document and hasattr(parts.build(method, Merge, "--method"), "fuse")


def planned(models: Any, method: Any = "merge.linear", base: str | None = None, dtype: str | None = None) -> Plan:
    """The plan of a merge, checked; nothing is written."""
    if isinstance(models, Mapping) or (isinstance(models, str | Path) and str(models).endswith((".yml", ".yaml"))):
        document = models if isinstance(models, Mapping) else mergekit_yaml.read_yaml(models)
        return mergekit_yaml.plan(document)
    models = [models] if isinstance(models, str | Path) else list(models)
    if not models:
        raise UserError("models", models, "name the models to merge")
    built = parts.build(method, Merge, "--method")
    if not hasattr(built, "plan"):
        raise UserError("--method", type(built).part_name, "this merge learns from data; use it in a recipe's merge step")
    if dtype is not None and dtype not in DTYPES:
        raise UserError("dtype", dtype, nearest(dtype, DTYPES))
    named = {b for m in models if (b := named_base(m))}
    if base is None and len(named) > 1:
        mend = "they were tuned from different bases; merge models of one base, or name it with --base"
        raise UserError("models", sorted(named), mend)
    if lost := next((m for m in models if "/" not in str(m) and not Path(m).exists() and "+" not in str(m)), None):
        raise UserError("model", str(lost), "no such folder; name a run, an adapter, a delta, a model folder or org/name")
    if file := next((m for m in models if Path(m).is_file()), None):
        raise UserError("model", str(file), "this is a file; name a run, an adapter, a delta or a model folder")
    for model in models:
        if "+" not in str(model) or Path(model).exists():
            locate(str(model), "model")
    base = base or next(iter(named), None)
    if base is None:
        built = built.baseless()
    if base is None and built.needs_base:
        raise UserError(
            "--base", None, "none of the models says what it was tuned from, and this method needs it; name the base"
        )
    under = open_input(base, field="--base") if base else None
    opened = [open_input(m, under) for m in models]
    return simple(built, opened, under, DTYPES.get(dtype)).check()


def described(plan: Plan) -> Any:
    return plan.described or parts.plain(plan.jobs[0].method)


def _as_delta(plan: Plan, out: str | Path, as_: str) -> dict[str, Any]:
    """The merge as a change of its base: low-rank where every model is and the method keeps it so."""
    from temperament.bases.load import load
    from temperament.delta import between
    from temperament.delta.lowrank import as_low_rank
    from temperament.run.export import export_delta

    job = plan.jobs[0]
    if job.base is None or len(plan.jobs) > 1:
        raise UserError("--as", as_, "a merge without a base, or of layer slices, is no change of one; use merged")
    base = load(plan.base, field="--base", own=True)
    component, under = next(iter(base.components)), unrounded(job.base)
    deltas = job.deltas or [between(under, source, lazy=True, identify=False) for source in job.models]
    deltas = [delta.remap(lambda name: f"{component}/{name.split('/', 1)[1]}") for delta in deltas]
    merged = job.method.merge(base, deltas)
    if as_ == "adapter":  # a sum of low-rank changes is one of their ranks together
        low = {name: as_low_rank(change) for name, change in merged.baked().changes.items()}
        if all(change is not None for change in low.values()):
            merged = replace(merged.baked(), changes=low)
    certificate = export_delta(base, merged, Path(out), as_)
    return {"out": str(out), "as": as_, "base": plan.base, "models": [i.spec for i in plan.inputs], "method": described(plan),
            "delta": {"parameters": merged.parameters, "bytes": merged.bytes}, "certificate": certificate}  # fmt: skip


# ---- beside the weights --------------------------------------------------------------------------------------------


def _beside(plan: Plan, new: Path) -> None:
    """config, generation config, tokenizer, template, card and the merge's own record."""
    config = dict(plan.config)
    kept = next(iter(plan.table().values())).dtype
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = str(kept).removeprefix("torch.")
    config.pop("_name_or_path", None)
    if config:
        write_json(new / "config.json", config)
    if (plan.folder / "generation_config.json").is_file():
        shutil.copyfile(plan.folder / "generation_config.json", new / "generation_config.json")
    if plan.tokenizer is not None:
        plan.tokenizer.save_pretrained(new)
    else:
        for path in sorted({p for pattern in FILES for p in plan.folder.glob(pattern)}):
            if path.is_file() and not path.name.endswith((".safetensors", ".bin")):
                shutil.copyfile(path, new / path.name)
    if (template := plan.chat_template) not in (None, "auto"):
        if "{" not in template:
            raise UserError("chat_template", template, "give a Jinja template, or auto; named templates are not kept here")
        (new / "chat_template.jinja").write_text(template, encoding="utf-8")
    record = {"method": described(plan), "base": plan.base, "models": [i.spec for i in plan.inputs]}
    write_json(new / "merge.json", record)
    (new / "README.md").write_text(card(plan), encoding="utf-8")


def card(plan: Plan) -> str:
    """A model card: what was merged, how, and how to repeat it."""
    import yaml

    names = [i.spec for i in plan.inputs]
    ids = [n for n in names if n.count("/") == 1 and not Path(n).exists() and not n.startswith(("lab/", ".", "/"))]
    head = {"library_name": "transformers", "tags": ["merge", "temperament"], **({"base_model": ids} if ids else {})}
    method = plan.jobs[0].method
    summary = (type(method).__doc__ or "").strip().split("\n")[0]
    shown = yaml.safe_dump(described(plan), sort_keys=False, default_flow_style=None).strip()
    front = yaml.safe_dump(head, sort_keys=False).strip()
    listed = "\n".join(f"- `{n}`{' (base)' if n == plan.base else ''}" for n in names)
    part = type(method).part_name
    return (
        f"---\n{front}\n---\n\nA merge made with temperament.\n\n{listed}\n\n**{part}**: {summary}\n\n```yaml\n{shown}\n```\n"
    )


__all__ = ["Input", "card", "certified", "merge", "planned"]
