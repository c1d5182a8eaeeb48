"""That a merged folder is what was computed: every tensor on disk bit for bit, and what a fresh process makes of the files.

Where nothing can be asked of a model of this kind the tensors alone are compared, and the certificate says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from temperament.bases.load import Base, _model_class, load
from temperament.bases.probe import Answer, question
from temperament.delta.certificate import certify
from temperament.delta.files import write_json
from temperament.delta.stream import Checkpoint
from temperament.delta.tensorfile import Entry
from temperament.errors import UserError, WorkFailed
from temperament.run.merge_inputs import COMPONENT
from temperament.run.merge_plan import Plan


class Held:
    """A writer that keeps what it is given: the same merge, in memory, for the certificate."""

    def __init__(self, table: Mapping[str, Entry]):
        self.table = table
        self.tensors: dict[str, Tensor] = {n: torch.empty(e.shape, dtype=e.dtype) for n, e in table.items()}

    def entry(self, name: str) -> Entry:
        return self.table[name]

    def block(self, name: str, start: int, tensor: Tensor) -> None:
        self.tensors[name].view(-1)[start : start + tensor.numel()] = tensor

    def write(self, name: str, tensor: Tensor) -> None:
        self.tensors[name].copy_(tensor)


def certified(plan: Plan, folder: Path, threads: int | None = None) -> dict[str, Any]:
    """The files loaded in a fresh process against the model computed here, from the plan alone."""
    held = Held(plan.table())
    plan.carry_out(held, threads)
    stored = Checkpoint(folder, COMPONENT)
    for name, tensor in held.tensors.items():
        if not torch.equal(stored.read(f"{COMPONENT}/{name}"), tensor):
            raise WorkFailed(f"{folder} was written, but its {name} is not that of the merge; do not use it.")
    live = _live(plan, folder, held.tensors)
    certificate = _asked(plan, folder, live) if isinstance(live, Base) else _of_tensors(live)
    write_json(folder / "certificate.json", certificate)
    if not certificate["passed"]:
        why = ", ".join(certificate["failures"])
        raise WorkFailed(
            f"{folder} was written, but loaded in a fresh process it differs from the merge ({why}); do not use it."
        )
    return certificate


def _of_tensors(why: str) -> dict[str, Any]:
    return {"passed": True, "failures": [], "compared": "tensors", "why": why}


def _live(plan: Plan, folder: Path, tensors: Mapping[str, Tensor]) -> Base | str:
    """The model its config describes with the tensors computed here; or why models of this kind cannot be asked."""
    try:
        base = load(folder)
    except UserError as problem:
        try:
            load(plan.folder)
        except UserError:  # nor can the one whose config it has
            return str(problem)
        raise WorkFailed(f"{folder} was written, but it does not load ({problem}); do not use it.") from None
    live = base.model.state_dict()
    known = [source for i in plan.inputs for source in i.source.names]
    odd = [n for n in tensors if n not in live and f"{COMPONENT}/{n}" not in known]
    if odd:
        told = f"its config describes a model with other tensors ({odd[0]})"
        raise WorkFailed(f"{folder} was written, but {told}; do not use it.")
    if all(n in live for n in tensors):  # (else a loader that renames: what it read from disk was compared)
        with torch.no_grad():
            for name, tensor in tensors.items():
                live[name].copy_(tensor)
    return base


def _asked(plan: Plan, folder: Path, base: Base) -> dict[str, Any]:
    import transformers

    try:
        inputs = question(base)
        with torch.no_grad():
            expected = Answer(base)(**inputs)
    except UserError:
        return _of_tensors("nothing is known to ask of a model of this kind")
    except Exception as problem:  # of an architecture whose inputs are of a kind not known here
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]
        return _of_tensors(f"nothing could be asked of it ({first})")
    tokenizer = plan.tokenizer
    if tokenizer is None and any(folder.glob("tokenizer*")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(plan.folder, local_files_only=True)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = _model_class(config, transformers)[0].__name__
    how = {"live": base.model, "processor": tokenizer, "model_class": kind, "compute": "float32"}
    return certify(folder, inputs, expected, **how) | {"compared": "outputs"}
