"""The models that are measured: random Llama shapes, and the 1.8 M lab model's own shape."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from temperament.bases.load import LAB, Base

SIZES = {"d=128, 4 layers": (128, 4), "d=256, 6 layers": (256, 6), "d=512, 8 layers": (512, 8)}


def llama(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def lab() -> LlamaForCausalLM:
    """The lab model (lab/lm), loaded afresh."""
    return LlamaForCausalLM.from_pretrained(LAB / "lm")


def lab_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(LAB / "lm")


def base_of(model: torch.nn.Module, tokenizer: Any = None) -> Base:
    return Base("python", {"lm": model}, {"tokenizer": tokenizer} if tokenizer else {}, sha256={"lm": "not needed here"})


def millions(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6
