"""A step without its numbers: the loop run on shapes, every allocation counted.

The model is copied as meta tensors (shapes, no storage), the trainable is built on it, and the real loop runs the real
objective on the real token ids; nothing but the tokens has values. A dispatch mode sees every tensor that is made and every one
that is freed, so the peak is that of the code that will run, whatever the architecture, adapter or objective - not of a formula
about Llamas. The same mode over a real step counts what that one allocated.

Not seen: the scratch space inside one kernel, and what an allocator keeps for later.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only

META = torch.device("meta")


class Counting(TorchDispatchMode):
    """Bytes of all tensor storages alive (`now`) and their most (`peak`), of those seen since it was entered or by `see`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive and (size := storage.nbytes()):
            self.alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = self.run(func, args, kwargs or {})
        tree_map_only(Tensor, self.see, out)
        return out

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        return func(*args, **kwargs)


class Shapes(Counting):
    """Counts bytes and multiplications of a run on meta tensors. Code that asks for a number there is none of is told 1."""

    def __init__(self, answers: Callable[[torch.dtype], Any] = lambda dtype: dtype is torch.bool or 1) -> None:
        super().__init__()
        self.answers, self.flops = answers, 0

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        aten = torch.ops.aten
        if not tree_any(_is_meta, (args, kwargs)):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self.answers(args[0].dtype)
        if func in (aten.allclose.default, aten.equal.default, aten.is_nonzero.default):
            return True
        to = kwargs.get("device")
        if func is aten._to_copy.default and to is not None and torch.device(to) != META:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.nonzero.default:  # a router's choice: everything is chosen
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device=META)
        if func is aten.copy_.default and not _is_meta(args[0]):
            return args[0]
        args, kwargs = tree_map_only(
            Tensor, lambda t: t if t.device == META else torch.empty_like(t, device=META), (args, kwargs)
        )
        if func.overloadpacket is getattr(aten, "_grouped_mm", None):  # its meta kernel knows bf16 only
            return self.grouped(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs"))
        out = func(*args, **kwargs)
        self.flops += _multiplications(func, args, out)
        return out

    def grouped(self, a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
        """The product of experts: rows or columns in groups, `ends` says where each group ends."""
        if a.dim() == 3 and b.dim() == 3:
            shape: tuple[int, ...] = (*a.shape[:2], b.shape[2])
        elif a.dim() == 2 and b.dim() == 2:
            shape = (ends.numel(), a.shape[0], b.shape[1])
        else:
            shape = (a.shape[-2], b.shape[-1])
        self.flops += 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
        return a.new_empty(shape)


def _is_meta(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device == META


def _multiplications(func: Any, args: tuple, out: Any) -> int:
    aten = torch.ops.aten
    name = func.overloadpacket
    if name is aten.mm:
        return 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
    if name is aten.addmm:
        return 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
    if name is aten.bmm:
        return 2 * args[0].shape[0] * args[0].shape[1] * args[0].shape[2] * args[1].shape[2]
    if name is aten.convolution:
        return 2 * out.numel() * args[1][0].numel()
    return 0


@contextmanager
def fused_attention(shapes: Shapes) -> Iterator[None]:
    """Attention on meta tensors keeps what the fast kernels keep (q, k, v, the output and a number a row), never rows x rows.
    The function is replaced, not intercepted: a recomputation inside a backward sees no function modes."""
    real = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _is_meta(query):
            return _Fused.apply(query, key, value, shapes)
        return real(query, key, value, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        ctx.shapes, ctx.flops = shapes, 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        shapes.flops += ctx.flops
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        q, k, v, *_ = ctx.saved_tensors
        ctx.shapes.flops += ctx.flops * 5 // 2
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def shapes_of(module: nn.Module) -> nn.Module:
    """A copy on the meta device: the same modules, ties included, and no weights."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device=META), requires_grad=p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device=META)
    return copy.deepcopy(module, memo)
