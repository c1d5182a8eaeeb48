"""Rollouts of more prompts a step than there are."""

import pytest
import torch

from temperament.bases.load import load
from temperament.methods.data.lab import LabData
from temperament.methods.rewards.lab import LabOracle
from temperament.methods.rollout.sample import Sample
from temperament.methods.rollout.two_turn import TwoTurn
from temperament.methods.select.full import Full
from temperament.run.training import build_players
from tests.train.rows import context, spec


@pytest.mark.parametrize("kind", [Sample, TwoTurn])
def test_a_prompt_that_comes_again_in_a_step_is_sampled_anew(kind):
    """Two prompts, eight groups: the groups are apart, and every response has draws of its own."""
    base, rows, group = load("lab/lm-small"), 32, 2
    part = kind(LabData(["add"], rows=2), [LabOracle()], group=group, max_new=6)
    ctx = context(base, seed=3, batch=rows)
    build_players(spec(source=part, trainable=[Full()], batch=rows), ctx)
    stream = part.open(ctx)
    assert len(stream.prompts) == 2
    batch = stream.batch(0)
    sizes = torch.unique(batch.group, return_counts=True)[1]
    assert set(sizes.tolist()) == {group} and len(sizes) == rows // group
    assert len({int(e) for e in batch.tokens.examples[:, 0]}) == rows
