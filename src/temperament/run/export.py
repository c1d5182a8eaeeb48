"""What leaves the house: an adapter others can load, a merged model, a delta - each reloaded in a fresh process and compared.

adapter    PEFT's layout, of a pipeline diffusers', when the whole change is low-rank; else refused with what to do instead
merged     a model or pipeline for from_pretrained, tokenizer and template with it, in the precision the base is stored in
delta      safetensors + delta.json: any change, exactly
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from temperament.bases.kept import kept
from temperament.bases.load import DTYPES, Base, change, load
from temperament.bases.pipeline import write_pipeline
from temperament.bases.probe import Answer, question
from temperament.delta import Delta, LowRank, between
from temperament.delta.certificate import certify, compare
from temperament.delta.diffusers_format import write_diffusers_lora
from temperament.delta.files import atomic_folder
from temperament.delta.peft_write import task_type, write_peft
from temperament.engine import see
from temperament.errors import UserError, WorkFailed, nearest
from temperament.train.checkpoint import write_atomic


def save_delta(delta: Delta, base: Base, folder: Path, base_id: str) -> str:
    """The run's `delta/`: in PEFT layout where PEFT knows the method, else our own; both bound to the base's sha256."""
    if as_peft(delta, base):
        write_peft(delta, folder, base=base.model, base_model=base_id, task_type=task_of(base), overwrite=True)
        return "peft"
    replace(delta, meta={**delta.meta, "on": base_id}).save(folder, overwrite=True)
    return "delta"


def task_of(base: Base) -> str | None:
    """What PEFT calls the task of this base."""
    encoder_decoder = getattr(getattr(base.model, "config", None), "is_encoder_decoder", False)
    return task_type([type(base.model).__name__], encoder_decoder)


def as_peft(delta: Delta, base: Base) -> bool:
    """Does PEFT know this change as an adapter? One model, every change low-rank, nothing added."""
    return (
        bool(delta.changes)
        and len(base.components) == 1
        and not delta.additions
        and not delta.buffers
        and all(isinstance(c, LowRank) for c in delta.changes.values())
    )


def delta_of(source: str, base: Base) -> Delta:
    """The delta of a run, a step of one, an adapter, a delta folder, or a tuned model folder, against `base`."""
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UserError("model", source, "no such folder; name a run, an adapter, a delta or a model folder")
    found = kept(path)
    if found is not None and found.delta is None:
        raise UserError("model", source, "this run changed no weights")
    if found is not None:
        return change(found.delta, base)
    if (path / "config.json").exists():
        return between(base.folder if base.folder is not None else base.model, path)
    raise UserError("model", source, "it is no run, adapter, delta or model folder")


def export(
    run: str | Path,
    to: str | Path,
    as_: Literal["merged", "adapter", "delta"] = "merged",
    point: dict[str, Any] | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Export a finished run (at a point of its dial, when given); returns the certificate. dtype: of a merged model; default:
    what the base is stored in."""
    from temperament.run.dial import scaled
    from temperament.run.reopen import reopen

    of_form(as_, dtype)
    found = reopen(run, "cpu")
    delta = found.delta if point is None else scaled(found.delta, point, found.base.places)
    return export_delta(found.base, delta, Path(to), as_, dtype)


def of_form(as_: str, dtype: str | None) -> None:
    """Refuse a precision that is none, or that this form does not have."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError("--dtype", dtype, nearest(dtype, DTYPES))
    if dtype is not None and as_ != "merged":
        raise UserError("--dtype", dtype, f"{as_} keeps the change as it was trained; a precision is chosen for --as merged")


def free(to: str | Path, field: str = "--to") -> None:
    """Refuse a folder that holds something, before any work is done for it."""
    path = Path(to)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(field, str(to), "it exists and is not empty; name a new folder")


def export_delta(base: Base, delta: Delta, to: Path, as_: str = "merged", dtype: str | None = None) -> dict[str, Any]:
    """Write base + delta to a new folder and certify it."""
    of_form(as_, dtype)
    free(to)
    question(base)  # refused before anything is written, where nothing could be compared
    if as_ == "delta":
        replace(delta, meta={**delta.meta, "on": base.id}).save(to)
        return certify_and_record(base, delta, to, as_)
    if as_ == "adapter" and "denoiser" in base.components:
        unet = type(base.components["denoiser"]).__name__.startswith("UNet")
        write_diffusers_lora(delta, to, unet=unet, base=base.id)
        return certify_and_record(base, delta, to, as_)
    if as_ == "adapter":
        if not as_peft(delta, base):
            raise UserError(
                "--as",
                "adapter",
                "this change is not low-rank, so adapter loaders cannot hold it; use --as merged, or `temper extract` for a "
                "low-rank approximation",
            )
        write_peft(delta, to, base=base.model, base_model=base.id, task_type=task_of(base))
        return certify_and_record(base, delta, to, as_)
    added = sorted(n for n, a in delta.additions.items() if a.ship)
    if added:
        raise UserError(
            "--as", "merged", f"it adds a module ({added[0]}), which merges {delta.merges[added[0]]}; use --as delta"
        )
    dtype = dtype or base.stored
    with atomic_folder(to) as new:
        base.reset()
        base.apply(delta)
        try:
            write(base, new, dtype)
        finally:
            base.reset()
    return certify_and_record(base, delta, to, as_, dtype)


def write(base: Base, folder: Path, dtype: str) -> None:
    """The base as it stands, in the layout of the library it comes from, its weights in this precision."""
    if "denoiser" in base.components:
        with rounded(Answer(base), dtype, back=False):
            return write_pipeline(base, folder)
    write_model(base.model, folder, dtype)
    for processor in base.processors.values():
        processor.save_pretrained(folder)


def write_model(model: torch.nn.Module, folder: Path, dtype: str) -> None:
    """The model in transformers' layout, its weights in this precision."""
    cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
    as_stored = lambda t: cast.setdefault(id(t), t.to(DTYPES[dtype])) if t.is_floating_point() else t
    weights = {name: as_stored(t) for name, t in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(folder, safe_serialization=True, state_dict={n: t.detach() for n, t in weights.items()})
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for config in (told, *(c for c in told.values() if isinstance(c, dict))):
        config |= {key: str(DTYPES[dtype]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if config.get(key)}
    write_atomic(folder / "config.json", json.dumps(told, indent=2, sort_keys=True) + "\n")


@contextmanager
@torch.no_grad()
def rounded(model: torch.nn.Module, dtype: str, back: bool = True) -> Iterator[None]:
    """The model with its weights rounded to what this precision holds; back: in the precision it computes in."""
    held = []
    for tensor in model.state_dict(keep_vars=True).values():
        new = tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
        new = new.to(tensor.dtype) if back else new
        if new.dtype != tensor.dtype or not torch.equal(new, tensor):
            held.append((tensor, tensor.data))
            tensor.data = new
    try:
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


def certify_and_record(base: Base, delta: Delta, to: Path, as_: str, dtype: str = "fp32") -> dict[str, Any]:
    """Reload from disk in a fresh process and compare with the live model; a difference is a failure, not a footnote. What is
    stored in a smaller precision is compared with the live model rounded to it, and what the rounding did is recorded."""
    base.reset()
    base.apply(delta)
    try:
        inputs, answer = question(base), Answer(base)
        with torch.no_grad():
            expected = answer(**inputs)
        if as_ == "merged":
            with rounded(answer, dtype), torch.no_grad():
                stored = answer(**inputs)
            how = {"reload": f"{__name__}:reread"}
            if "denoiser" not in base.components:
                how = {"live": base.model, "processor": base.tokenizer, "model_class": _auto_class(base)}
            how |= {"compute": str(expected.dtype).removeprefix("torch."), "trust": base.trusted}
            certificate = certify(to, inputs, stored, **how)
            certificate |= {"dtype": dtype, "rounding": compare(stored, expected)}
        else:
            certificate = certify(to, inputs, expected, base=base.id, reload=f"{__name__}:reloaded", trust=base.trusted)
    finally:
        base.reset()
    write_atomic(to / "certificate.json", json.dumps(certificate, indent=1))
    if not certificate["passed"]:
        raise WorkFailed(
            f"{to} was written, but reloaded in a fresh process it differs from the live model "
            f"({', '.join(certificate['failures'])}); do not use it."
        )
    return certificate


def reloaded(base: str, folder: Path, trust: bool = False) -> tuple[torch.nn.Module, dict[str, str]]:
    """In the fresh process: the base by its name, with what is in the folder on it."""
    found = load(base, own=True, trust_remote_code=trust)
    found.apply(change(folder, found))
    return Answer(found), found.sha256


def reread(base: None, folder: Path, trust: bool = False) -> tuple[torch.nn.Module, dict[str, str]]:
    """In the fresh process: what is in the folder, by the library it is written for."""
    found = load(folder, trust_remote_code=trust)
    return Answer(found), found.sha256


def _auto_class(base: Base) -> str:
    if see.dual(base):
        return "AutoModel"
    named = {"encoder": "AutoModelForMaskedLM", "image_encoder": "AutoModelForImageClassification"}
    written = "AutoModelForSeq2SeqLM" if base.model.config.is_encoder_decoder else "AutoModelForCausalLM"
    return named.get(next(iter(base.components)), written)


__all__ = ["as_peft", "certify_and_record", "delta_of", "export", "export_delta", "save_delta"]
