from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from temperament.delta import Delta, Replace
from temperament.engine.own import own_texts
from temperament.errors import UserError
from temperament.methods.merge._least_squares import Fit, fits_of, maps_of, recorded, rows
from temperament.methods.merge._matching import Moments, by_activations, by_weights
from temperament.methods.merge._wide import Layout, joined, layout
from temperament.nn.batch import Tokens
from temperament.nn.groups import Group, groups_of, index, permuted
from temperament.nn.norms import counted, counting_anew
from temperament.parts import part
from temperament.protocols import Source
from temperament.train.context import Context
from temperament.train.world import World


@part("merge.pleas", papers=["129"])
@dataclass(frozen=True)
class PLeaS:
    """Permutations and least squares: two models of one architecture made one, also if they were trained from different starts.

        1  units of model 2 are put in model 1's order, group by group: the assignment with the least sum of |x1_u - x2_v|^2
        2  `apart` of the units of each group, those that match worst, stay apart: n units become n (1 + apart), between the
           mean of the weights (0) and both models side by side (1)
        3  each linear map is fitted to the outputs of both models on their own activations (closed form, ridge)

    x are activations on the same inputs, or weights (`match`), in turn until nothing changes. Inputs are rows of any kind: of
    the task, generic, or none - language models then write their own; with match: weights and solve: false nothing is read at
    all. Moved: residual stream, hidden units, key heads with their query heads, what is inside a head (with rotary positions
    not the rows of q and k). Wider: hidden units and, where the config allows it, heads; a plain network in all. Batch norms
    are measured again. Source: Nasery et al. 2024, PLeaS (paper 129); ours: one share for all groups, closed form.
    """

    match: Literal["activations", "weights"] = "activations"  # by what units are matched
    apart: float = 0.0  # share of each group's units that are not merged
    budget: float | None = None  # instead: multiply-adds of the result over those of one model, at most
    solve: bool = True  # fit each map by least squares; False: the mean of permuted weights
    ridge: float = 1e-3  # pull to the mean, in units of the mean square of a map's inputs
    data: Source | None = None  # rows both models read; none: texts they write themselves
    rows: int = 64  # how many rows are read, or written
    length: int = 64  # tokens of a written one

    def __post_init__(self):
        if not 0 <= self.apart <= 1:
            raise ValueError(f"apart lies in [0, 1], not {self.apart}")
        if self.budget is not None and self.budget < 1:
            raise ValueError("budget is at least 1")
        if self.ridge < 0:
            raise ValueError("ridge must not be negative")

    @property
    def reads(self) -> bool:
        """Does it look at inputs?"""
        return self.solve or self.match == "activations"

    def check(self, models: int) -> None:
        if models != 2:
            raise UserError("merge.pleas: number of models", models, "it merges 2; name as many")

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        """The merge of two changes of one base, of its width; inputs are what the two models write."""
        self.check(len(deltas))
        if self.apart or self.budget:
            raise UserError(
                "merge.pleas.apart", self.apart, "a wider model is no change of the base; use `temper merge` on model folders"
            )
        models = []
        for delta in deltas:
            base.reset()
            base.apply(delta)
            models.append(copy.deepcopy(base.model))
        base.reset()
        made = self.fuse(models, self.inputs(base, models))
        component, changes = next(iter(base.components)), {}
        for name, value in made.named_parameters():
            changes[f"{component}/{name}"] = Replace(value.detach())
        return Delta(changes, base=dict(base.sha256))

    def inputs(self, base: Any, models: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
        """What both models read: rows of `data`, else what they write; nothing where nothing is looked at."""
        _alike(*(dict(m.state_dict()) for m in models))
        if not self.reads:
            return []
        if self.data is None:  # half of the texts from each
            each = max(1, self.rows // len(models))
            batches = [t for k, model in enumerate(models) for t in own_texts(model, each, self.length, seed=k)]
        else:
            stream = self.data.open(Context(base, World()))
            batches = [stream.batch(step) for step in range(-(-self.rows // 16))]
        if any(not isinstance(b, Tokens) or b.packed for b in batches):
            raise UserError("merge.pleas.data", type(self.data).part_name, "give plain rows of text, not packed")
        return [{"input_ids": b.ids, "attention_mask": b.mask.long()} for b in batches]

    @torch.no_grad()
    def fuse(self, models: Sequence[nn.Module], batches: Sequence[Any] = (), example: Any = None) -> nn.Module:
        """A new module. batches: inputs of the forward, keyword dicts or tensors; example: one, to trace a plain network."""
        first, second = (m.eval() for m in models)
        if self.reads and not batches:
            raise UserError(
                "merge.pleas",
                "no inputs",
                "matching by activations and fitting look at inputs; give rows, or match: weights and solve: false",
            )
        example = example if example is not None or not batches else batches[0]
        groups = groups_of(first, example)
        one, two = dict(first.state_dict()), dict(second.state_dict())
        _alike(one, two)
        one, two = (_own(m, s) for m, s in ((first, one), (second, two)))
        if self.match == "weights":
            orders, scores = by_weights(one, two, groups)
        else:
            orders, scores = by_activations(groups, self._moments(first, second, groups, batches))
        there = permuted(two, groups, orders)
        if example is not None:
            _verified(second, there, example)
        sizes = _allowed(first, groups, self._apart(one, groups))
        alone = {g: scores[g].sort(stable=True).indices[:k].sort().values for g, k in sizes.items() if k}
        where = layout(one, groups, alone)
        state = joined(one, there, where)
        if self.solve:
            fits = self._fitted(first, second, index(two, groups, orders), where, batches)
            for name, fit in fits.items():
                bias = state.get(f"{name}.bias")
                state[f"{name}.weight"], bias = fit.solve(state[f"{name}.weight"], bias, self.ridge)
                if bias is not None:
                    state[f"{name}.bias"] = bias
        made = _rebuilt(first, state, groups, sizes)
        if batches:
            measure_norms(made, batches)
        return made

    def _moments(self, first, second, groups: Sequence[Group], batches: Sequence[Any]) -> dict[tuple[str, str], Moments]:
        ends = {(s.module, s.end): s.channel for top in groups for g in top.walk() for s in g.seen}
        out: dict[tuple[str, str], Moments] = {}
        for batch in batches:
            x, y = (recorded(m, batch, ends) for m in (first, second))
            for key, axis in ends.items():
                found = Moments.of(rows(x[key], axis), rows(y[key], axis))
                out[key] = out[key] + found if key in out else found
        return out

    def _apart(self, state: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, int]:
        """{group: units that stay apart}."""
        wide = [g for g in groups if g.wide]
        at = lambda share: {g.name: int(share * g.units + 0.5) for g in wide}
        if self.budget is None:
            return at(self.apart)
        low, high = 0.0, 1.0
        if cost(state, groups, at(1.0)) <= self.budget:
            return at(1.0)
        for _ in range(30):  # the cost grows with the share
            middle = (low + high) / 2
            low, high = (middle, high) if cost(state, groups, at(middle)) <= self.budget else (low, middle)
        return at(low)

    def _fitted(
        self, first, second, order: Mapping[tuple[str, int], Tensor], where: Layout, batches: Sequence[Any]
    ) -> dict[str, Fit]:
        maps = maps_of(first)
        fits = fits_of(maps, where)
        for batch in batches:
            wanted = [(n, end) for n in fits for end in ("input", "output")]
            x, y = (recorded(m, batch, wanted) for m in (first, second))
            for name, fit in fits.items():
                turned = type(maps[name]).__name__ == "Conv1D"
                sides = {}
                for end, axis, entries in (("input", int(not turned), fit.into), ("output", int(turned), fit.out)):
                    channel = 1 if isinstance(maps[name], nn.Conv2d) else -1
                    a, b = (r[name, end].movedim(channel, -1) for r in (x, y))
                    moved = order.get((f"{name}.weight", axis))
                    b = b if moved is None else b[..., moved]
                    sides[end] = entries.gather(a, b).movedim(-1, channel)
                fit.add(sides["input"], sides["output"])
        return fits


def cost(state: Mapping[str, Tensor], groups: Sequence[Group], sizes: Mapping[str, int]) -> float:
    """Multiply-adds of the maps over those of one model: base * ((1 + a)(1 + b) - 2 a b) for shares a and b of a map's axes."""
    share = {g.name: sizes.get(g.name, 0) / g.units for g in groups}
    axes: dict[str, dict[int, float]] = {}
    for g in groups:
        for a in g.axes:
            axes.setdefault(a.tensor, {})[a.axis] = share[g.name]
    whole = made = 0.0
    for name, found in axes.items():
        if state[name].dim() < 2:
            continue
        a, b = (*found.values(), 0.0)[:2]
        whole += state[name].numel()
        made += state[name].numel() * ((1 + a) * (1 + b) - 2 * a * b)
    return made / whole


def _alike(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    odd = sorted(set(one) ^ set(two)) or [n for n in one if one[n].shape != two[n].shape]
    if odd:
        shapes = [list(s[odd[0]].shape) if odd[0] in s else None for s in (one, two)]
        raise UserError(f"shape of {odd[0]}", shapes, "both models must be of one architecture and vocabulary")
    for state in (one, two):
        broken = next((n for n, w in state.items() if not bool(w.isfinite().all())), None)
        if broken:
            raise UserError(f"values of {broken}", "not all finite", "a model is damaged or its training diverged; use another")


def _own(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under the name its module gives it first."""
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    return {n: w.detach().float() if w.is_floating_point() else w for n, w in state.items() if n not in tied}


def _output(model: nn.Module, example: Any) -> Tensor:
    out = model(**example) if isinstance(example, Mapping) else model(example)
    return out if isinstance(out, Tensor) else next(v for v in out.values() if isinstance(v, Tensor) and v.is_floating_point())


def _verified(model: nn.Module, state: Mapping[str, Tensor], example: Any) -> None:
    """A permuted model computes what it did; where not, its architecture has an order this does not know of."""
    moved = copy.deepcopy(model)
    moved.load_state_dict(state, strict=False)
    before, after = _output(model, example), _output(moved, example)
    if float((before - after).abs().max()) > 1e-3 * float(before.std()):
        raise UserError(
            "model", type(model).__name__, "its units do not change places freely; it cannot be merged by permutation"
        )


def _config(model: nn.Module, groups: Sequence[Group], sizes: Mapping[str, int]) -> Any:
    config = copy.deepcopy(model.config)
    for group in groups:
        more = sizes.get(group.name, 0)
        if group.name.endswith("hidden"):
            key = "intermediate_size" if getattr(config, "intermediate_size", None) else "n_inner"
            setattr(config, key, group.units + more)
        elif group.name.endswith("heads") and more:
            each = model.config.num_attention_heads // group.units
            config.num_attention_heads = each * (group.units + more)
            if hasattr(config, "num_key_value_heads"):
                config.num_key_value_heads = group.units + more
    return config


def _allowed(model: nn.Module, groups: Sequence[Group], sizes: dict[str, int]) -> dict[str, int]:
    """Fewer heads apart, where a config takes only some numbers of heads (Llama's: divisors of the width)."""
    if not hasattr(model, "config"):
        return sizes
    heads = [g.name for g in groups if g.name.endswith("heads") and sizes.get(g.name)]
    while heads and sizes[heads[0]]:
        try:
            config = _config(model, groups, sizes)
            type(config)(**config.to_dict())
            break
        except Exception:  # each config refuses a number of heads in its own way
            sizes = sizes | {name: sizes[name] - 1 for name in heads}
    return sizes


def _rebuilt(model: nn.Module, state: dict[str, Tensor], groups: Sequence[Group], sizes: Mapping[str, int]) -> nn.Module:
    """A model of the state's widths: by its config where it has one, else a copy with other tensors."""
    if not any(sizes.values()):
        made = copy.deepcopy(model)
        made.load_state_dict(state, strict=False)
        return made
    if hasattr(model, "config"):
        made = type(model)(_config(model, groups, sizes)).eval()
        made.load_state_dict(state, strict=False)
        made.tie_weights()
        return made
    made = copy.deepcopy(model)
    for name, m in made.named_modules():
        for key, p in list(m._parameters.items()) + list(m._buffers.items()):
            if p is not None and p.is_floating_point():
                new = state[f"{name}.{key}" if name else key]
                store = m._parameters if key in m._parameters else m._buffers
                store[key] = nn.Parameter(new) if key in m._parameters else new
        w = getattr(m, "weight", None)
        if isinstance(m, nn.Linear):
            m.out_features, m.in_features = w.shape
        elif isinstance(m, (nn.Conv1d, nn.Conv2d)):
            m.out_channels = w.shape[0]
            m.groups = w.shape[0] if m.groups > 1 else 1
            m.in_channels = w.shape[1] * m.groups
        elif hasattr(m, "num_features") and w is not None:
            m.num_features = len(w)
    return made


def measure_norms(model: nn.Module, batches: Sequence[Any]) -> None:
    """Running statistics of batch norms, measured again: the merged units vary less than those they come from."""
    if norms := counted([model]):
        with counting_anew(norms):
            for batch in batches:
                _output(model, batch)


__all__ = ["PLeaS", "cost", "measure_norms"]
