"""The groups of a plain network (MLP, CNN, residual CNN), read off its graph.

Channels that come out of a map are new units; what acts on each channel by itself (activation, pooling, batch norm) hands them
on; an addition makes two groups one; flattening makes of each channel a block of entries. Inputs and outputs stay in order.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from temperament.errors import UserError
from temperament.nn.groups import Axis, Group, Seen

MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
ADD = (operator.add, operator.iadd, torch.add)


@dataclass
class Flow:
    """Channels on their way: the number of their group (-1: in a fixed order), entries of one, and the axis they lie on."""

    group: int
    block: int = 1
    axis: int = 1


class _Trace:
    def __init__(self, model: nn.Module, example: Tensor):
        self.model, self.axes, self.seen, self.parent = model, {}, {}, []
        graph = fx.symbolic_trace(model)
        ShapeProp(graph).propagate(example)
        flows: dict[fx.Node, Flow | None] = {}
        for node in graph.graph.nodes:
            inputs = [flows[n] for n in node.all_input_nodes if flows.get(n) is not None]
            if node.op == "output":
                for flow in inputs:
                    self.fix(flow.group)
            elif node.op == "placeholder":
                flows[node] = Flow(-1)
            elif node.op == "call_module":
                flows[node] = self.module(node, model.get_submodule(node.target), inputs)
            else:
                flows[node] = self.function(node, inputs)

    # -- groups that turn out to be one --

    def new(self) -> int:
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def root(self, g: int) -> int:
        while g >= 0 and self.parent[g] != g:
            g = self.parent[g]
        return g

    def join(self, a: int, b: int) -> int:
        a, b = sorted((self.root(a), self.root(b)))
        if b >= 0:
            self.parent[b] = a
        return a

    def fix(self, g: int) -> None:
        self.join(-1, g)

    # -- what nodes do to channels --

    def add(self, group: int, tensor: str, axis: int, n: int, block: int, side: str) -> None:
        at = torch.arange(n * block).view(n, block)
        self.axes.setdefault(group, []).append(Axis(tensor, axis, at, side))

    def module(self, node: fx.Node, m: nn.Module, inputs: list[Flow]) -> Flow:
        shape, (flow, *_) = node.meta["tensor_meta"].shape, inputs
        if isinstance(m, MAPS):
            depthwise = getattr(m, "groups", 1) > 1
            if depthwise and m.groups != m.in_channels:
                self.refuse(node.target, m, "grouped convolutions other than depthwise")
            out = flow.group if depthwise else self.new()
            width, axis = (m.out_features, len(shape) - 1) if isinstance(m, nn.Linear) else (m.out_channels, 1)
            if depthwise and width != m.in_channels:
                self.refuse(node.target, m, "depthwise convolutions that make more channels")
            if not depthwise:
                n = m.weight.shape[1] // flow.block
                self.add(flow.group, f"{node.target}.weight", 1, n, flow.block, "in")
            for name in ("weight", "bias"):
                if getattr(m, name) is not None:
                    self.add(out, f"{node.target}.{name}", 0, width, 1, "out")
            self.seen.setdefault(out, []).append(Seen(node.target, torch.arange(width)[:, None], "output", axis))
            return Flow(out, 1, axis)
        if isinstance(m, NORMS):
            for name in ("weight", "bias", "running_mean", "running_var"):
                if getattr(m, name) is not None:
                    self.add(flow.group, f"{node.target}.{name}", 0, m.num_features // flow.block, flow.block, "out")
            return flow
        if any(True for _ in m.parameters()):
            self.refuse(node.target, m, "modules of this kind")
        return self.reshaped(node, flow)

    def function(self, node: fx.Node, inputs: list[Flow]) -> Flow | None:
        if node.op == "get_attr":
            raise UserError("model", str(node.target), "a parameter that stands alone is not known how to match")
        if not inputs:
            return None
        if node.target in ADD and len(inputs) == 2:
            return Flow(self.join(inputs[0].group, inputs[1].group), inputs[0].block, inputs[0].axis)
        if len(inputs) > 1:
            raise UserError("model", str(node.target), "of what joins two paths only additions are known")
        return self.reshaped(node, inputs[0])

    def reshaped(self, node: fx.Node, flow: Flow) -> Flow | None:
        """What acts on each channel by itself, or lays its entries in a row."""
        if "tensor_meta" not in node.meta or not hasattr(node.meta["tensor_meta"], "shape"):
            return None
        before, after = node.all_input_nodes[0].meta["tensor_meta"].shape, node.meta["tensor_meta"].shape
        if flow.axis >= len(after):
            raise UserError("model", str(node.target), "channels are lost from sight here")
        if before[flow.axis] == after[flow.axis]:
            return flow
        if flow.axis == 1 and len(after) == 2 and after[1] == before[1:].numel():
            return Flow(flow.group, flow.block * (after[1] // before[1]), 1)
        raise UserError("model", str(node.target), "channels are lost from sight here")

    def refuse(self, name: str, m: nn.Module, what: str) -> None:
        raise UserError("model", f"{name} ({type(m).__name__})", f"{what} are not known how to match")


def traced(model: nn.Module, example: Any) -> list[Group]:
    assert example is not None, "a plain network is traced with an input"
    found = _Trace(model, example)
    axes: dict[int, list[Axis]] = {}
    seen: dict[int, list[Seen]] = {}
    for g, own in found.axes.items():
        axes.setdefault(found.root(g), []).extend(own)
    for g, own in found.seen.items():
        seen.setdefault(found.root(g), []).extend(own)
    return [Group(f"units {g}", tuple(axes[g]), tuple(seen.get(g, ()))) for g in sorted(axes) if g >= 0]
