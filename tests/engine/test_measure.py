"""Skills measured: every item by itself, whatever goes beside it."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from temperament.engine.measure import System, TextSkill
from temperament.engine.tokens import Sampling, generate


class Drawn:
    """A decoding part that samples, as one of particles does."""

    def hooks(self, base):
        return []

    @property
    def loop(self):
        return lambda models, prompts, sampling, **how: generate(
            models, prompts, Sampling(max_new=sampling.max_new, temperature=1.0), eos=(), **how
        )


def test_what_an_item_is_answered_does_not_hang_on_the_batch():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()
    words = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    base = SimpleNamespace(model=model, tokenizer=words)
    asked = [[3, 5]] * 6
    said = [TextSkill("t", (), max_new=8)._answers(asked, System(base, [Drawn()], batch=b)) for b in (2, 3, 64)]
    assert said[0] == said[1] == said[2] and len(set(said[0])) == 6  # and no two items share their draws
