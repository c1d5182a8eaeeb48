from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from temperament.delta import Addition
from temperament.engine.error_model import ErrorModel, trace
from temperament.errors import UserError
from temperament.nn import draws, forward
from temperament.nn.batch import Batch, Tokens
from temperament.nn.pieces import Around
from temperament.parts import part, plain
from temperament.protocols import Term, Terms
from temperament.train.live import Param, Trained

FIELDS = ("into", "inner", "error", "at", "segments", "positions")


@part("adapters.copilot", papers=["270"], modalities=("text",))
@dataclass(frozen=True)
class CopilotAdapter:
    """A copilot beside what is trained, the pilot: learns from a log of the pilot's mistakes, and corrects it while decoding.

        log:   each step, before the pilot learns from the batch: its input, mean state of its blocks, l_i = onehot(y_i) - p_i
        loss:  sqrt( mean_i || f_i - l_i ||^2 ), of a step drawn from the log     f_i: the guess at l_i from what is before i

    A root of the mean square, for squares would shrink errors that are small already. Nothing flows back into the pilot: with
    clip: null (a norm would be taken over both) it ends with the bits it has without a copilot. The copilot has blocks of the
    pilot's shape, begun from its weights (every second one looks at the pilot's states), and foresees nothing at first. The log
    is state; of more than `keep` steps it holds a fair sample. What is learnt is used by `decode.copilot` in the recipe's
    `inference:`. Source: Zou et al. 2025, Transformer Copilot (paper 270).
    """

    layers: int = 2  # blocks of the copilot
    factor: float = 1.0  # its learning rate over the pilot's
    keep: int = 32  # steps in the log at most

    def __post_init__(self):
        if self.layers < 2 or self.keep < 1:
            raise ValueError("layers must be at least 2 (every second one looks at the pilot), keep at least 1")

    def build(self, base: Any, ctx: Any) -> Trained:
        at, head = head_of(base)
        copilot = begun(base, self.layers, ctx.seed).to(head.weight.device)
        own = dict(copilot.named_parameters())
        record = lambda n, p: Param(f"{at}:copilot.{n}", p, n.rpartition(".")[2], lr_factor=self.factor, decay=p.dim() > 1)
        params = [record(n, p) for n, p in own.items()]
        log = Log(self.keep, ctx.seed)
        lesson, options = Lesson(copilot, log, base.places.blocks()), plain(self)
        options = options[type(self).part_name] if isinstance(options, dict) else {}
        made = lambda: Addition(type(self).part_name, options, {n: p.detach().clone() for n, p in own.items()})
        return Trained(params, around={f"{at}:copilot": (head, copilot)}, terms=[lesson], state=log.state, load=log.load,
                       additions=lambda: {f"{at}:copilot": made()})  # fmt: skip

    def rebuild(self, base: Any, name: str, addition: Addition) -> tuple[nn.Module, Around]:
        copilot = ErrorModel(**shape(base), layers=self.layers)
        copilot.load_state_dict({n: t.float() for n, t in addition.tensors.items()})
        return head_of(base)[1], copilot


@dataclass
class Log:
    """Records by step: dicts of cpu tensors. Of all steps a fair sample of at most `keep`: a reservoir, drawn by step."""

    keep: int
    seed: int
    records: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)  # step -> where in the reservoir it is

    def add(self, step: int, record: dict[str, Tensor]) -> None:
        if step not in self.records:
            place = step if step < self.keep else self.drawn(step + 1, "place", step)
            if place >= self.keep:
                return
            for old in [s for s, p in self.places.items() if p == place]:
                del self.records[old], self.places[old]
            self.places[step] = place
        self.records[step] = record

    def draw(self, step: int) -> dict[str, Tensor]:
        known = sorted(self.records)
        return self.records[known[self.drawn(len(known), "lesson", step)]]

    def drawn(self, high: int, purpose: str, step: int) -> int:
        return int(draws.randint(high, self.seed, f"copilot/{purpose}", step, torch.zeros(1, dtype=torch.long)))

    def state(self) -> dict[str, Tensor]:
        held = {f"{s}/{n}": t for s, record in self.records.items() for n, t in record.items()}
        return held | {f"{s}/place": torch.tensor(p) for s, p in self.places.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.records, self.places = {}, {}
        for key, tensor in state.items():
            step, name = key.split("/")
            if name == "place":
                self.places[int(step)] = int(tensor)
            else:
                self.records.setdefault(int(step), {})[name] = tensor.cpu()


class Lesson:
    """The copilot's loss, once an optimizer step: on one record, whole, whatever the batch is split into."""

    per = "step"

    def __init__(self, copilot: ErrorModel, log: Log, blocks: list[Any]):
        self.copilot, self.log, self.blocks, self.drawn = copilot, log, blocks, {}

    def prepare(self, whole: Batch, views: Any) -> None:
        if not isinstance(whole, Tokens):
            mend = "it learns from mistakes on given answers; use a source of rows with answers"
            raise UserError("adapters.copilot", type(whole).__name__, mend)
        together = views.precompute("live", whole, lambda m, t: torch.cat(trace(m, t, self.blocks), -1))
        width = (together.shape[-1] - self.copilot.enter.in_features) // 2
        into, inner, error = together.split([width, width, together.shape[-1] - 2 * width], -1)
        at = (whole.weights.reshape(-1) != 0).nonzero()[:, 0].cpu()  # errors are kept where there are any: they are wide
        record = {"into": into.contiguous(), "inner": inner.contiguous(), "error": error.flatten(0, 1)[at], "at": at}
        record |= {n: getattr(whole, n).cpu().clone() for n in ("segments", "positions")}
        self.log.add(views.progress.step, record)
        self.drawn = self.log.draw(views.progress.step)

    def loss(self, micro: Any, views: Any) -> Terms:
        device = self.copilot.enter.weight.device
        into, inner, kept, at, segments, positions = (self.drawn[n].to(device) for n in FIELDS)
        error = into.new_zeros(segments.numel(), kept.shape[-1]).index_copy(0, at, kept)
        said = self.copilot.predict(into, inner, error.view(*segments.shape, -1), segments, positions)
        before = said.flatten(0, 1)[at - 1]  # what was said of each token before it; the first of a row is never one of them
        return {"copilot": Term((before - kept).square().sum(-1).mean().sqrt(), 1.0)}


def head_of(base: Any) -> tuple[str, nn.Module]:
    """component/path and module of the output head: where the copilot hangs."""
    head = forward.head_of(base.model)
    if head is None or forward.kind(base.model) != "decoder":
        raise UserError("adapters.copilot", base.id, "it stands beside a decoder with an output head; use a language model")
    component = next(name for name, module in base.components.items() if module is base.model)
    return next(f"{component}/{path}" for path, module in base.model.named_modules() if module is head), head


def shape(base: Any) -> dict[str, Any]:
    """Sizes of the pilot, as far as its config names them."""
    c = forward.module_of(base.model).config.get_text_config()
    heads = c.num_attention_heads
    head = getattr(c, "head_dim", None) or c.hidden_size // heads
    rope = getattr(c, "rope_parameters", None)
    theta = (rope.get("rope_theta") if isinstance(rope, dict) else getattr(c, "rope_theta", None)) or 10000.0
    kv_heads, inner = (getattr(c, name, None) for name in ("num_key_value_heads", "intermediate_size"))
    return {"vocabulary": c.vocab_size, "width": c.hidden_size, "heads": heads, "kv_heads": kv_heads or heads, "head": head,
            "inner": inner or 4 * c.hidden_size, "theta": theta}  # fmt: skip


@torch.no_grad()
def begun(base: Any, layers: int, seed: int) -> ErrorModel:
    """A copilot with the maps of the pilot's blocks, spread over its depth, where roles and shapes agree; else random."""
    copilot = ErrorModel(**shape(base), layers=layers)
    for name, p in copilot.named_parameters():
        if name != "leave.weight" and "norm" not in name and not name.endswith(("before.weight", "between.weight")):
            p.copy_(torch.randn(p.shape, generator=draws.generator(seed, f"copilot/{name}")) * 0.02)
    blocks = base.places.blocks()
    for k, layer in enumerate(copilot.layers):
        block = blocks[round(k * (len(blocks) - 1) / (layers - 1))]
        for place in block.places:
            mine = getattr(layer, place.role, None) if place.role in ("q", "k", "v", "o", "gate", "up", "down") else None
            if mine is not None and place.matrix().shape == mine.weight.shape:
                mine.weight.copy_(place.matrix())
    return copilot
