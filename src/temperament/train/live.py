"""What the optimizer sees, and the versions it holds.

A trainable part builds a `Trained`: parameter records, the pieces it attached, and how its change reads as a delta. `Live` is
one or several of them on one base. Every *version* is a set of tensors of the trained parameters; `live.at("start")` runs the
same modules with another version's tensors in place - by pointer, never by copying into live parameters, so several versions
may take part in one autograd graph:

    base       the model before any step: pieces off, original tensors
    start      as this step began (after SFT it is the SFT model): the default reference
    ema        the running mean, when kept
    best       as it was at the best evaluation
    NAME       any mark: live.mark("teacher")

Several players of a step may each have a `Live` of their own on one base (a critic beside the policy). At rest the modules
are the first one's; `at` shows the one that is asked, its tensors and pieces in place and the others' away, but for the one
it stands `on`, which it sees as it is now and does not train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from temperament.delta import Change, Delta, Replace, Sparse
from temperament.delta.combined import add
from temperament.errors import UserError
from temperament.nn.pieces import Switch, attach
from temperament.train import packed
from temperament.train.trained import Param, Trained


@dataclass(frozen=True)
class View:
    """A version of the model as something to call; `active()` makes it the current one for a while (what `score` and `generate`
    take)."""

    holder: Any  # a Live or a Base: anything with at(version) and model
    version: str = "live"

    @property
    def module(self) -> nn.Module:
        return self.holder.model

    def active(self):
        return self.holder.at(self.version)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        with self.active() as model:
            return model(*args, **inputs)


class Live:
    """company: the trainables of this step on this base, this one added; empty: it is the first. on: the one it sees
    underneath. Any but the first is built inside `twins(base)`, so that what it trains is its own."""

    def __init__(self, base: Any, parts: list[Trained], company: list[Live] | None = None, on: Live | None = None):
        self.base, self.parts = base, parts
        self.company, self.on = company if company is not None else [], on
        first = not self.company
        self.switch = Switch(on=first)
        self.heads = {name: head for part in parts for name, head in part.heads.items()}
        self.params = _by_name(parts)
        self.versions: dict[str, dict[str, Tensor]] = {}
        self._where = self._locations()
        _refuse_tied(base, parts)
        self.company.append(self)
        self._detach = [attach(module, piece, self.switch) for part in parts for module, piece in part.attached()]
        for name, module in base.parameters() if first else ():
            module.requires_grad_(name in self.params)
        for name, p in self.params.items():
            if not first and name in self._where:
                p.held.data = p.held.data.clone()  # a twin shares its memory with the first one's
            p.tensor.requires_grad_(True)
        known = dict(base.parameters())
        for name, collect in (item for part in parts for item in part.through.items()):
            self._detach.append(known[name].requires_grad_(True).register_post_accumulate_grad_hook(collect).remove)
        self._packed = [p for p in self.params.values() if p.dense is not None]
        self._detach += [packed.gather(p).remove for p in self._packed]
        # What the base's own tensors were: what `start` is, what `base` is where no earlier step changed them, what resets
        # them.
        self.start = {n: p.held.detach().clone() for n, p in self.params.items() if n in self._where}
        for name, tensor in self.start.items():
            base.originals.setdefault(name, tensor)

    # -- the model ---------------------------------------------------------------------------------------------------------

    def __getitem__(self, component: str) -> nn.Module:
        return self.base.components[component]

    @property
    def model(self) -> nn.Module:
        """The only component, or the first: what a language objective calls."""
        return next(iter(self.base.components.values()))

    def _locations(self) -> dict[str, list[tuple[dict, str]]]:
        """Where each trained tensor of the *base's own modules* hangs: every (parameter dict, key), ties included."""
        mine = {id(p.held): n for n, p in self.params.items()}
        found: dict[str, list] = {}
        for component in self.base.components.values():
            for module in component.modules():
                for key, tensor in module._parameters.items():
                    if tensor is not None and id(tensor) in mine:
                        found.setdefault(mine[id(tensor)], []).append((module._parameters, key))
        return found

    # -- versions ----------------------------------------------------------------------------------------------------------

    def mark(self, version: str) -> None:
        """Remember the trained tensors as they are now."""
        self.versions[version] = {n: p.held.detach().clone() for n, p in self.params.items()}

    def view(self, version: str = "live") -> View:
        return View(self, version)

    @contextmanager
    def at(self, version: str = "live") -> Iterator[nn.Module]:
        """The model as `version`. Inside, calls see that version's tensors; outside, the live ones again."""
        pure = version == "base" or (version == "start" and "start" not in self.versions)
        with self._alone(None if pure else self.on), self._at(version) as model:
            yield model

    @contextmanager
    def _alone(self, on: Live | None) -> Iterator[None]:
        """Show this trainable on the modules of the base, and the one it stands on; the others as if they were not."""
        if len(self.company) == 1:
            yield
            return
        with ExitStack() as stack:
            for other in self.company:
                if other is not self:
                    stack.enter_context(other._off())
                    stack.enter_context(other._with(other.start))
            if on is not None:
                stack.enter_context(on._off(False))
                stack.enter_context(on._with({n: p.held.detach() for n, p in on.params.items()}))
            stack.enter_context(self._off(False))
            stack.enter_context(self._with({n: p.held for n, p in self.params.items() if n in self.start}))
            yield

    @contextmanager
    def _at(self, version: str) -> Iterator[nn.Module]:
        if version == "live":
            yield self.model
        elif version == "base":
            with self._off(), self.base.bare(), self._with(self.base.originals):
                yield self.model
        elif version == "start" and "start" not in self.versions:
            # Pieces start at no change, so the step's start is the weights as they were, with the pieces off.
            with self._off(), self._with(self.start):
                yield self.model
        else:
            if version not in self.versions:
                raise UserError("version", version, f"the trainable holds {', '.join(['base', 'start', *self.versions])}")
            with self._with(self.versions[version]):
                yield self.model

    @contextmanager
    def _off(self, off: bool = True) -> Iterator[None]:
        was, self.switch.on = self.switch.on, not off
        try:
            yield
        finally:
            self.switch.on = was

    @contextmanager
    def _with(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        undo = []
        try:
            for name, tensor in tensors.items():
                for table, key in self._where.get(name) or self._piece_slots(name) or self.base.slots(name):
                    undo.append((table, key, table[key]))
                    table[key] = tensor
            yield
        finally:
            for table, key, old in reversed(undo):
                table[key] = old

    def _piece_slots(self, name: str) -> list[tuple[dict, str]]:
        if name not in self.params:
            return []
        tensor = self.params[name].tensor
        for module in (
            m for part in self.parts for own in (*(p for _, p in part.attached()), *part.heads.values()) for m in own.modules()
        ):
            for key, held in module._parameters.items():
                if held is tensor:
                    self._where[name] = [(module._parameters, key)]
                    return self._where[name]
        return []

    def tensors(self, version: str = "live") -> dict[str, Tensor]:
        """The base's own trained tensors as they are in a version: what a penalty on weights compares."""
        own = [n for n in self.params if n in self._where and n in self.start]
        if version == "live":
            return {n: self.params[n].held for n in own}
        if version == "base":
            return {n: self.base.originals[n] for n in own}
        held = self.start if version == "start" and "start" not in self.versions else self.versions.get(version)
        if held is None:
            raise UserError("version", version, f"the trainable holds {', '.join(['base', 'start', *self.versions])}")
        return {n: held[n] for n in own}

    # -- around a step -----------------------------------------------------------------------------------------------------

    def before_step(self, progress: Any) -> None:
        for part in self.parts:
            if part.before_step:
                part.before_step(progress)

    def after_step(self, progress: Any) -> None:
        for p in self._packed:
            packed.put(p)
        for part in self.parts:
            if part.after_step:
                part.after_step(progress)

    def reselect(self, progress: Any, state: Any) -> None:
        """Move the masks that move now, and with them the optimizer's state."""
        for part in self.parts:
            for name, entries in (part.reselect(progress) if part.reselect else {}).items():
                packed.repack(self.params[name], entries, state)

    # -- what it leaves ----------------------------------------------------------------------------------------------------

    def delta(self) -> Delta:
        """The change since this step began, as expressions on the weights it began with."""
        changes: dict[str, Change] = {}
        for part in self.parts:
            for name, (_, piece) in part.pieces.items():  # pieces on one weight all read that weight: their changes add
                change = piece.change().mapped(Tensor.detach)
                changes[name] = add(changes[name], change) if name in changes else change
            if part.changes:
                changes.update(part.changes())
        own = {n for n in self.params if n in self._where and n in self.start}
        for name in sorted(own):
            now, was = self.params[name].held.detach(), self.start[name]
            if torch.equal(now, was):
                continue
            if name in changes:  # trained itself and under a piece as well
                changes[name] = Replace(changes[name].apply(now))
            else:
                changes[name] = Replace(now.clone()) if self.params[name].dense is None else Sparse.changed(was, now)
        additions = {k: v for part in self.parts if part.additions for k, v in part.additions().items()}
        return Delta(changes=changes, additions=additions, base=dict(self.base.sha256))

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"param/{n}": p.held.detach() for n, p in self.params.items()}
        state |= {f"entries/{p.name}": p.entries for p in self._packed}
        for version, tensors in self.versions.items():
            state |= {f"version/{version}/{n}": t for n, t in tensors.items()}
        for i, part in enumerate(self.parts):
            if part.state:
                state |= {f"part/{i}/{n}": t for n, t in part.state().items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.versions = {}
        for key, tensor in state.items():
            kind, rest = key.split("/", 1)
            if kind == "param":
                self.params[rest].held.data = tensor.to(self.params[rest].held)
            elif kind == "entries":
                self.params[rest].entries = tensor.to(self.params[rest].tensor.device)
            elif kind == "version":
                version, name = rest.split("/", 1)
                self.versions.setdefault(version, {})[name] = tensor.to(self.params[name].tensor)
        for p in self._packed:
            packed.take(p)
        for i, part in enumerate(self.parts):
            if part.load:
                part.load({k.split("/", 2)[2]: t for k, t in state.items() if k.startswith(f"part/{i}/")})

    def close(self) -> None:
        """Take all that is attached away; the modules are the base's own again (selected tensors keep their trained values)."""
        for detach in self._detach:
            detach()
        self._detach = []


def _by_name(parts: list[Trained]) -> dict[str, Param]:
    """Every trained tensor by its name. Where two adapters stand on one weight the later one's tensors get the number of the
    part."""
    params: dict[str, Param] = {}
    for i, part in enumerate(parts):
        taken = {p.name for p in part.params if p.name in params and params[p.name].tensor is not p.tensor}
        for p in part.params:
            p.name = f"{p.name}~{i}" if p.name in taken else p.name
            p.partner = f"{p.partner}~{i}" if p.partner in taken else p.partner
            params.setdefault(p.name, p)
    return params


def _refuse_tied(base: Any, parts: list[Trained]) -> None:
    """A piece changes what one module computes; merged into a tensor that two modules share it would change both."""
    tied = {name: group for group in base.places.tied() for name in group} if any(part.pieces for part in parts) else {}
    for name in (n for part in parts for n in part.pieces if n in tied):
        other = next(n for n in tied[name] if n != name)
        why = f"it is tied to {other}, so an adapter on it could not be merged"
        raise UserError("targets", name, f"{why}; leave it out, or train the tensor itself (select.full with only)")


@contextmanager
def twins(base: Any) -> Iterator[None]:
    """Inside, every parameter of the base is another one that shares its memory: a trainable built here leaves those of the
    first alone."""
    undo = []
    try:
        for name, p in list(base.parameters()):
            twin = nn.Parameter(p.detach(), requires_grad=False)
            for table, key in base.slots(name):
                undo.append((table, key, table[key]))
                table[key] = twin
        yield
    finally:
        for table, key, old in reversed(undo):
            table[key] = old
