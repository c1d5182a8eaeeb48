"""DPO's loss against trl's own, called with a stand-in for its trainer: the same log-probs must give the same number."""

from unittest.mock import MagicMock

import pytest
import torch
from tiny import gradients, live, pairs, plain_label, shake, tiny

from temperament import parts


class Outputs:
    """What trl reads of a model's output: log-probs; the rest only feeds its metrics."""

    def __init__(self, log_probs):
        self.log_probs = log_probs

    def __getattr__(self, name):
        return torch.ones_like(self.log_probs, dtype=torch.bool if name.startswith("is_") else None)


def theirs(trl, beta, policy, reference):
    trainer = MagicMock(
        beta=beta,
        label_smoothing=0.0,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        _tp_size=1,
        _total_train_tokens=0,
    )
    trainer.accelerator.device, trainer.accelerator.gather = "cpu", lambda x: x
    trainer.accelerator.gather_for_metrics = lambda x: x
    ids, mask = torch.ones(policy.shape, dtype=torch.long), torch.ones(policy.shape, dtype=torch.long)
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: Outputs(policy[:, 1:]), inputs, False)


def test_dpo():
    trl = pytest.importorskip("trl")
    if not hasattr(trl.DPOTrainer, "_compute_loss"):
        pytest.skip("this trl has no callable loss")
    it, batch, beta = shake(live(tiny("llama"), {"adapters.lora": {"rank": 2}})), pairs(4), 0.3
    with torch.no_grad():
        both = lambda: torch.cat([plain_label(it.model, t) * t.weights for t in (batch.chosen, batch.rejected)])
        policy = both()
        with it.at("base"):
            reference = both()
    part = parts.build({"objectives.preference.dpo": {"beta": beta}})
    _, got = gradients(it, part, batch, 2)
    want = float(theirs(trl, beta, policy, reference))
    assert got.loss == pytest.approx(want, rel=1e-4)
