"""Each classic fault of fine-tuning, injected, and refused before anything is trained - in one sentence that names the law."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from temperament.errors import UserError
from temperament.methods.adapters.lora import LoRA
from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
from temperament.methods.select.full import Full
from temperament.nn import forward, logprobs
from temperament.nn.logprobs import label, score
from temperament.parts import part
from temperament.protocols import Term
from temperament.run.check import check
from temperament.run.recipe import Recipe, Step
from temperament.train.trained import Trained
from temperament.train.world import World
from tests.train.rows import BOS, END, Rows, Stream, base_of, spec


def refused(law: str, name: str = "llama_tied", **options) -> str:
    base = base_of(name)
    with pytest.raises(UserError) as problem:
        check(Recipe("tiny", [Step("sft", train=spec(**options))]), base, World())
    message = str(problem.value)
    assert problem.value.exit_code == 2 and message.endswith(".") and "\n" not in message
    assert law in message, message
    return message


def accepted(**options) -> None:
    found = check(Recipe("tiny", [Step("sft", train=spec(**options))]), base_of("llama_tied"), World())
    assert found["ok"] and all(law["ok"] for step in found["steps"] for law in step["laws"])


# ---- the objective -----------------------------------------------------------------------------------------------------------


class Mean(CrossEntropy):
    """The fault of the decade: each micro-batch normalised on its own, then again by their number."""

    def counts(self, whole):
        return {"nll": 2}

    def loss(self, micro, views):
        value = -(score(views.model, micro, label())["label"] * micro.weights).sum() / micro.trained
        return {"nll": Term(value, 1)}


class CountsColumns(CrossEntropy):
    """Padding is counted."""

    def counts(self, whole):
        return {"nll": whole.ids.numel()}

    def loss(self, micro, views):
        return {"nll": Term(-score(views.model, micro, label())["label"] * micro.weights, micro.ids.numel())}


class CountsRows(CrossEntropy):
    """Packed rows are counted as examples."""

    def counts(self, whole):
        return {"nll": len(whole)}

    def loss(self, micro, views):
        return {"nll": Term(-score(views.model, micro, label())["label"] * micro.weights, len(micro))}


class Noisy(CrossEntropy):
    """Draws without an address."""

    def loss(self, micro, views):
        term = super().loss(micro, views)["nll"]
        return {"nll": Term(term.value * (1 + 0.1 * torch.rand(())), term.count)}


class Silent(CrossEntropy):
    """Loses its graph."""

    def loss(self, micro, views):
        return {"nll": Term(-score(views.model, micro, label())["label"].detach() * micro.weights, micro.trained)}


@pytest.mark.parametrize("objective, law, options", [
    (Mean(), "rows together = one by one", {}),
    (CountsColumns(), "padding", {}),
    (CountsRows(), "packed = one by one", {"source": Rows(packed=True)}),
    (Noisy(), "same twice", {}),
    (Silent(), "a gradient", {}),
])  # fmt: skip
def test_wrong_objective(objective, law, options):
    refused(law, objective=objective, **options)


def test_an_objective_that_counts_rows_is_right_where_nothing_is_packed():
    accepted(objective=CountsRows())


# ---- the data ----------------------------------------------------------------------------------------------------------------


@part("data.test_spoilt")
@dataclass(frozen=True)
class Spoilt:
    """Rows with a fault."""

    fault: str
    packed: bool = False
    yields: ClassVar = ("Tokens",)

    def open(self, ctx):
        return Stream(lambda step: getattr(self, self.fault)(Rows(packed=self.packed).make(ctx.batch, step)))

    def end_masked(self, t):
        return replace(t, weights=t.weights * (t.ids != END))

    def no_end(self, t):
        return replace(t, ids=torch.where(t.ids == END, 9, t.ids))

    def doubled_bos(self, t):
        t.ids[:, 1] = BOS
        return t

    def all_masked(self, t):
        return replace(t, weights=t.weights * 0)

    def one_masked(self, t):
        t.weights[1] = 0
        return t

    def one_segment(self, t):
        return replace(t, segments=t.segments.clamp(max=0))


@pytest.mark.parametrize("fault, law", [
    ("end_masked", "end of turn"), ("no_end", "end of turn"), ("doubled_bos", "one BOS"),
    ("all_masked", "trained tokens"), ("one_masked", "trained tokens"),
])  # fmt: skip
def test_wrong_rows(fault, law):
    refused(law, source=Spoilt(fault))


def test_packing_without_borders():
    refused("documents apart", source=Spoilt("one_segment", packed=True))


def test_packing_that_leaks(monkeypatch):
    """The model is told of no borders: documents attend to each other."""
    monkeypatch.setattr(forward, "_packed_inputs", lambda model, tokens, how: {"input_ids": tokens.ids, "use_cache": False})
    monkeypatch.setattr(forward, "packing", lambda model: forward.Packing("positions"))
    refused("packed = one by one", source=Rows(packed=True))


def test_a_model_that_cannot_pack_is_not_given_packed_rows():
    assert "pack" in refused("packing", name="bloom", source=Rows(packed=True))


# ---- what is trained ---------------------------------------------------------------------------------------------------------


def test_mistyped_target():
    assert "q_proj" in refused("q_prj", trainable=[LoRA(targets=["q_prj"])])


def test_tied_embedding_split_by_a_merge():
    """An adapter on the embedding alone cannot be merged into a tensor that is the head as well."""
    assert "tied" in refused("could not be merged", trainable=[LoRA(targets=["embed_tokens"])])


@part("select.test_untie")
@dataclass(frozen=True)
class Untie:
    """Trains all, after giving the head a weight of its own."""

    def build(self, base, ctx) -> Trained:
        base.model.lm_head.weight = nn.Parameter(base.model.lm_head.weight.detach().clone())
        return Full().build(base, ctx)


def test_tie_cut():
    refused("tied stays tied", trainable=[Untie()])


@part("select.test_meddle")
@dataclass(frozen=True)
class Meddle:
    """LoRA that also edits a base weight."""

    def build(self, base, ctx) -> Trained:
        trained = LoRA(rank=2).build(base, ctx)
        with torch.no_grad():
            base.model.model.layers[0].mlp.up_proj.weight.mul_(1 + 1e-6)
        return trained


def test_adapter_that_edits_the_base():
    refused("off = base", trainable=[Meddle()])


def test_change_that_disagrees_with_the_forward(monkeypatch):
    from temperament.methods.adapters import lora

    change = lora.LoRAPiece.change
    monkeypatch.setattr(lora.LoRAPiece, "change", lambda self: change(self).scaled(0.5))
    refused("merged = unmerged", trainable=[LoRA()])


def test_loss_streamed_wrongly(monkeypatch):
    after = logprobs._after_head
    monkeypatch.setattr(logprobs, "_after_head", lambda *a: (lambda f: lambda x: f(x) * 1.01)(after(*a)))
    refused("streamed = plain loss")


def test_nothing_wrong_is_accepted():
    accepted(trainable=[LoRA(rank=2)])
    accepted(source=Rows(packed=True))
