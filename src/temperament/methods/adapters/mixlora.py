from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temperament.delta import Addition
from temperament.errors import UserError
from temperament.nn import draws, forward, linalg
from temperament.nn.batch import Batch, Tokens
from temperament.nn.context import context, current
from temperament.nn.draws import Address
from temperament.nn.pieces import Around, Under
from temperament.parts import part, plain
from temperament.protocols import Term, Terms
from temperament.train.trained import Param, Trained

STREAM = "adapters.mixlora"  # where a forward leaves (router probabilities, chosen experts, real tokens) of each layer
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "intermediate_act_fn")


class Mixture(Around):
    """An MLP as experts that share its weights: y = sum_k w_k MLP_k(x), each with a low-rank change of its own.

    x (..., D) flattened to (n, D);  router (E, D);  up_A (E, r, D), up_B (E, F, r), likewise gate;  down_A (E, r, F), down_B
    (E, D, r).
    """

    starts_at_zero = True  # every expert is the MLP and the weights sum to one

    def __init__(self, tensors: dict[str, Tensor], maps: dict[str, nn.Module], act: Any, scale: float, k: int):
        super().__init__()
        self.tensors = nn.ParameterDict({n: nn.Parameter(t) for n, t in tensors.items()})
        self.__dict__["maps"] = maps  # of the base: called, never owned
        self.act, self.scale, self.k = act, scale, k

    def low(self, role: str, e: int, x: Tensor) -> Tensor:
        """scale * B_e A_e x, (m, out)."""
        A, B = self.tensors[f"{role}_A"][e], self.tensors[f"{role}_B"][e]
        return self.scale * F.linear(F.linear(x.to(A.dtype), A), B).to(x.dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(probabilities (n, E), chosen experts (n, k), their weights (n, k), summing to one); softmax in fp32."""
        probabilities = F.linear(x, self.tensors["router"].to(x.dtype)).softmax(-1, dtype=torch.float32)
        best, experts = probabilities.topk(self.k, dim=-1)
        return probabilities, experts, best / best.sum(-1, keepdim=True)

    def forward(self, base: Under, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        probabilities, experts, weights = self.route(flat)
        now = current()
        if now.draws is not None and self.tensors["router"].requires_grad:  # only a training step asks, of no other version
            mask = torch.ones(flat.shape[0], dtype=torch.bool, device=x.device) if now.mask is None else now.mask.reshape(-1)
            now.streams.setdefault(STREAM, []).append((probabilities, experts, mask))
        shared = {role: self.maps[role](flat) for role in ("gate", "up") if role in self.maps}  # once for all experts
        out = torch.zeros_like(flat)
        of = len(self.tensors["router"])
        for e in range(of):
            token, slot = linalg.rows_of(experts, e, of)
            mine = flat[token]
            wide = {role: shared[role][token] + self.low(role, e, mine) for role in shared}
            h = self.act(wide["gate"]) * wide["up"] if "gate" in wide else self.act(wide["up"])
            y = self.maps["down"](h) + self.low("down", e, h)
            out = out.index_add(0, token, y * weights[token, slot, None].to(y.dtype))
        out = out.view(x.shape)
        if self.strength != 1:
            dense = base(x, *args, **kwargs)
            out = dense + self.strength * (out - dense)
        return out


class Balance:
    """The balance term of all layers:  weight * E * sum_layers sum_e F_e P_e,  over the real tokens of the whole batch.

    F_e: slots given to e / tokens (no gradient), found over the whole batch before the first backward; then the term is a sum
    over tokens, sum_t p_t . F, and does not depend on how rows are split. P_e: mean probability of e.
    """

    per = "batch"

    def __init__(self, layers: int, experts: int, weight: float):
        self.layers, self.experts, self.weight = layers, experts, weight
        self.load = torch.zeros(layers, experts)

    def counts(self, whole: Batch) -> dict[str, float]:
        return {"balance": float(sum(int(t.mask.sum()) for t in _tokens(whole)))}

    def prepare(self, whole: Batch, views: Any) -> None:
        slots = sum(views.precompute("live", t, self.slots).sum(0) for t in _tokens(whole))
        self.load = slots / max(self.counts(whole)["balance"], 1.0)

    def slots(self, model: Any, tokens: Tokens) -> Tensor:
        """(rows, layers, E): how many real tokens of each row every expert got."""
        address = Address(0, "route", 0, tokens.examples, tokens.positions)
        with context(mask=tokens.mask, draws=address, streams={}) as now:
            model(**forward.inputs(model, tokens))
            found = []
            for _, experts, mask in now.streams[STREAM]:
                one = F.one_hot(experts, self.experts).sum(1) * mask[:, None]  # (rows * T, E)
                found.append(one.view(*tokens.ids.shape, self.experts).sum(1))
        return torch.stack(found, 1).float()

    def loss(self, micro: Batch, views: Any) -> Terms:
        seen = current().streams.pop(STREAM, [])
        load = self.load.to(seen[0][0].device) if seen else self.load
        # A batch of pairs makes two forwards, each through all layers in order.
        value = sum(((p * mask[:, None]) @ load[i % self.layers]).sum() for i, (p, _, mask) in enumerate(seen))
        return {"balance": Term(self.experts * value, self.counts(micro)["balance"], weight=self.weight)} if seen else {}


@part("adapters.mixlora", papers=["257"])
@dataclass(frozen=True)
class MixLoRA:
    """MixLoRA: every MLP of a dense model becomes a sparse mixture of experts that share its weights and differ by LoRA.

        y = sum over the top k of w_e MLP_e(x)     w = softmax(x G^T), the k largest, made to sum to one; no token is dropped
        MLP_e: gate, up and down each with (alpha / rank) B_e A_e added; the base's gate and up are computed once for all

    At the start it is the base whatever the router says (B = 0). Trained: experts and routers; attention gets an ordinary
    `adapters.lora` beside it in the stack. A balance term keeps experts in use: a * E * sum_e F_e P_e in each layer, over the
    real tokens of the whole effective batch. It does not merge. Source: Li et al. 2024, MixLoRA (paper 257).
    """

    rate_factor: ClassVar = 10.0  # usual rate over full fine-tuning's

    experts: int = 8  # experts of a layer
    k: int = 2  # experts a token goes to
    rank: int = 16  # width of each expert's products
    alpha: float | None = None  # strength; default: 2 * rank
    balance: float = 1e-2  # weight of the balance term; 0: none
    std: float = 0.02  # spread of the routers at the start

    def __post_init__(self):
        if not 1 <= self.k <= self.experts or self.rank < 1:
            raise ValueError("k lies between 1 and experts, rank is at least 1")
        if (self.alpha is not None and self.alpha <= 0) or min(self.balance, self.std) < 0:
            raise ValueError("alpha is above 0; balance and std are not negative")

    @property
    def scale(self) -> float:
        return (self.alpha if self.alpha is not None else 2.0 * self.rank) / self.rank

    def build(self, base: Any, ctx: Any) -> Trained:
        trained = Trained()
        for name, places in mlps(base).items():
            hung = module_of(base, name).__dict__.get("_pieces", ())
            if any(isinstance(piece, Mixture) and switch.on for piece, switch in hung):
                mend = "an earlier step made it a mixture, which a second one would leave out; give this step `start: base`"
                raise UserError("adapters.mixlora", name, mend)
            mixture = self.mixture(base, name, places, self.initial(name, places, ctx.seed))
            trained.around[f"{name}:mixlora"] = (module_of(base, name), mixture)
            depth = base.places.depth_of(places["down"].name)
            for key, tensor in mixture.tensors.items():
                role, _, factor = key.rpartition("_")
                partner = {"A": f"{name}:{role}_B", "B": f"{name}:{role}_A"}.get(factor)
                trained.params.append(Param(f"{name}:{key}", tensor, factor if role else key, depth, partner, self.scale))
        if self.balance:
            trained.terms = [Balance(len(trained.around), self.experts, self.balance)]
        options = plain(self)[type(self).part_name]
        trained.additions = lambda: {
            n: Addition(type(self).part_name, options, {k: t.detach().clone() for k, t in m.tensors.items()})
            for n, (_, m) in trained.around.items()
        }  # fmt: skip
        return trained

    def rebuild(self, base: Any, name: str, addition: Addition) -> tuple[nn.Module, Around]:
        at = name.rpartition(":")[0]
        places = mlps(base)[at]
        like = places["down"].weight
        tensors = {k: t.to(like) for k, t in addition.tensors.items()}
        return module_of(base, at), self.mixture(base, at, places, tensors)

    def mixture(self, base: Any, name: str, places: dict[str, Any], tensors: dict[str, Tensor]) -> Mixture:
        module = module_of(base, name)
        act = next((getattr(module, a) for a in ACTIVATIONS if callable(getattr(module, a, None))), None)
        if act is None:
            mend = f"the activation of {type(module).__name__} is not known; use adapters.lora"
            raise UserError("adapters.mixlora", name, mend)
        return Mixture(tensors, {role: p.module for role, p in places.items()}, act, self.scale, self.k)

    def initial(self, name: str, places: dict[str, Any], seed: int) -> dict[str, Tensor]:
        """Router normal; A uniform in +-1/sqrt(in) for each expert; B zero."""
        like, made = places["down"].weight, {}
        width = places["up"].shape[1]
        generator = draws.generator(seed, f"mixlora/{name}/router")
        made["router"] = self.std * torch.randn(self.experts, width, generator=generator)
        for role, p in places.items():
            A = torch.empty(self.experts, self.rank, p.shape[1])
            A.uniform_(-1, 1, generator=draws.generator(seed, f"mixlora/{name}/{role}"))
            made[f"{role}_A"] = A / math.sqrt(p.shape[1])
            made[f"{role}_B"] = torch.zeros(self.experts, p.shape[0], self.rank)
        return {k: t.to(like) for k, t in made.items()}


def mlps(base: Any) -> dict[str, dict[str, Any]]:
    """component/path of every MLP in a block -> its places by role: up, down and, where it has one, gate."""
    found: dict[str, dict[str, Any]] = {}
    for p in base.places:
        if p.depth is not None and p.role in ("gate", "up", "down") and p.kind in ("linear", "conv1d"):
            found.setdefault(p.name.rpartition(".")[0], {})[p.role] = p
    whole = {n: places for n, places in found.items() if {"up", "down"} <= places.keys()}
    if not whole:
        raise UserError("adapters.mixlora", "the base", "no MLP with up and down maps of its own is there; use adapters.lora")
    return whole


def module_of(base: Any, name: str) -> nn.Module:
    component, _, path = name.partition("/")
    return base.components[component].get_submodule(path)


def _tokens(batch: Batch) -> list[Tokens]:
    return [batch] if isinstance(batch, Tokens) else [v for v in vars(batch).values() if isinstance(v, Tokens)]
