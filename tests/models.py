"""Tiny random models of every architecture family the project promises to handle, built from configs: no hub, no weights.

    MODELS["llama"].build(seed=0)      the model, in eval mode, fp32
    MODELS["llama"].inputs(seed=1)     keyword arguments for its forward, batch of two
    MODELS["llama"].output(out)        the main output tensor of `model(**inputs)`
    MODELS["llama"].language           "causal", "seq2seq", "masked" or None: which language loss it has

Biases, norms and positions start at zero or one in most architectures; `build` shakes every parameter, so that a test that
compares two computations cannot pass because a term was zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, ROWS, LENGTH = 61, 2, 7


@dataclass(frozen=True)
class Tiny:
    """One tiny model: how to make it, how to feed it, where its main output is."""

    name: str
    make: Callable[[], nn.Module]
    feed: Callable[[torch.Generator], dict[str, Any]]
    language: str | None = None
    blocks: tuple[tuple[str, int], ...] = ()
    needs: str = "transformers"

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.make().float().eval()
        rng = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=rng))
        return model

    def inputs(self, seed: int = 1) -> dict[str, Any]:
        return self.feed(torch.Generator().manual_seed(seed))

    @staticmethod
    def output(out: Any) -> Tensor:
        for name in ("logits", "sample", "last_hidden_state", "logits_per_image"):
            if isinstance(getattr(out, name, None), Tensor):
                return getattr(out, name)
        raise AssertionError(f"no main output among {type(out).__name__}")


def tokens(rng: torch.Generator, length: int = LENGTH) -> Tensor:
    """Token ids away from the specials (which the tiny configs put at 0..4)."""
    return torch.randint(5, VOCAB, (ROWS, length), generator=rng)


def _text(rng):
    return {"input_ids": tokens(rng)}


def _encdec(rng):
    return {"input_ids": tokens(rng), "decoder_input_ids": tokens(rng, 5)}


def _pixels(size: int):
    return lambda rng: {"pixel_values": torch.randn(ROWS, 3, size, size, generator=rng)}


def _causal(config_name: str, **options) -> Callable[[], nn.Module]:
    def make():
        import transformers

        config = getattr(transformers, config_name + "Config")(**{**SPECIAL, **options})
        return transformers.AutoModelForCausalLM.from_config(config)

    return make


def _build(class_name: str, config_name: str, **options) -> Callable[[], nn.Module]:
    def make():
        import transformers

        return getattr(transformers, class_name)(getattr(transformers, config_name + "Config")(**options))

    return make


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**BERT, "image_size": 16, "patch_size": 8}


def _clip(name: str):
    text = {**BERT, **SPECIAL, "max_position_embeddings": 16, "projection_size": 32}
    joint = {"projection_dim": 24} if name == "CLIP" else {}
    return _build(f"{name}Model", name, text_config=text, vision_config=VISION, **joint)


def _llava():
    import transformers as t

    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**{**LLAMA, **SPECIAL, "vocab_size": 70}),
        image_token_index=65, image_seq_length=4)
    return t.LlavaForConditionalGeneration(config)


def _llava_inputs(rng):
    ids = tokens(rng)
    ids[:, 1:5] = 65
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_pixels(16)(rng)}


def _qwen2_vl():
    import transformers as t

    config = t.Qwen2VLConfig(
        text_config={**LLAMA, **SPECIAL, "vocab_size": 70,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
                       "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=65, vision_start_token_id=66, vision_end_token_id=67, video_token_id=68)
    return t.Qwen2VLForConditionalGeneration(config)


def _qwen2_vl_inputs(rng):
    ids = tokens(rng)
    ids[:, 1], ids[:, 2:4], ids[:, 4] = 66, 65, 67
    grid = torch.tensor([[1, 4, 2]] * ROWS)  # 8 patches, merged 2 x 2 into 2 tokens
    types = (ids == 65).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": grid, "mm_token_type_ids": types,
            "pixel_values": torch.randn(8 * ROWS, 3 * 2 * 4 * 4, generator=rng)}


def _unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4)


def _dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=11, norm_num_groups=4)


def _sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=8, qk_norm="rms_norm")


def _flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=12, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=False, axes_dims_rope=(2, 2, 4))


def _image_latents(rng):
    return torch.randn(ROWS, 3, 8, 8, generator=rng)


def _unet_inputs(rng):
    return {"sample": _image_latents(rng), "timestep": torch.tensor([3, 500]),
            "encoder_hidden_states": torch.randn(ROWS, 5, 24, generator=rng)}


def _dit_inputs(rng):
    return {"hidden_states": _image_latents(rng), "timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([1, 7])}


def _sd3_inputs(rng):
    return {"hidden_states": _image_latents(rng), "timestep": torch.tensor([3, 500]),
            "encoder_hidden_states": torch.randn(ROWS, 5, 24, generator=rng),
            "pooled_projections": torch.randn(ROWS, 20, generator=rng)}


def _flux_inputs(rng):
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {"hidden_states": torch.randn(ROWS, 16, 12, generator=rng), "timestep": torch.tensor([0.1, 0.9]), "img_ids": ids,
            "txt_ids": torch.zeros(5, 3), "encoder_hidden_states": torch.randn(ROWS, 5, 24, generator=rng),
            "pooled_projections": torch.randn(ROWS, 20, generator=rng)}


def _spectrogram(rng):
    return {"input_values": torch.randn(ROWS, 12, 8, generator=rng)}


def _whisper_inputs(rng):
    return {"input_features": torch.randn(ROWS, 8, 32, generator=rng), "decoder_input_ids": tokens(rng, 5)}


DECODER = (("decoder", 2),)
PAIR = (("encoder", 2), ("decoder", 2))

MODELS: dict[str, Tiny] = {
    t.name: t
    for t in [
        Tiny("llama", _causal("Llama", **LLAMA), _text, "causal", DECODER),
        Tiny("llama_tied", _causal("Llama", **LLAMA, tie_word_embeddings=True), _text, "causal", DECODER),
        Tiny("qwen2", _causal("Qwen2", **LLAMA), _text, "causal", DECODER),
        Tiny("qwen3", _causal("Qwen3", **LLAMA, head_dim=12), _text, "causal", DECODER),
        Tiny("mistral", _causal("Mistral", **LLAMA, sliding_window=4), _text, "causal", DECODER),
        Tiny("mixtral", _causal("Mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2), _text, "causal", DECODER),
        Tiny("gemma2", _causal("Gemma2", **LLAMA, head_dim=12, sliding_window=4), _text, "causal", DECODER),
        Tiny("gemma3", _causal("Gemma3Text", **LLAMA, head_dim=12, sliding_window=4,
             layer_types=["sliding_attention", "full_attention"]), _text, "causal", DECODER),
        Tiny("phi3", _causal("Phi3", **LLAMA), _text, "causal", DECODER),
        Tiny("gpt2", _causal("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64), _text, "causal", DECODER),
        Tiny("gpt_neox", _causal("GPTNeoX", **BERT, max_position_embeddings=64), _text, "causal", DECODER),
        Tiny("opt", _causal("OPT", hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, word_embed_proj_dim=32), _text, "causal", DECODER),
        Tiny("bloom", _causal("Bloom", hidden_size=32, n_layer=2, n_head=4), _text, "causal", DECODER),
        Tiny("t5", _build("T5ForConditionalGeneration", "T5", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2,
             num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False), _encdec, "seq2seq", PAIR),
        Tiny("bert", _build("BertForMaskedLM", "Bert", **BERT, vocab_size=VOCAB, max_position_embeddings=64), _text, "masked",
             (("encoder", 2),)),
        Tiny("roberta", _build("RobertaForMaskedLM", "Roberta", **BERT, vocab_size=VOCAB, max_position_embeddings=64), _text,
             "masked", (("encoder", 2),)),
        Tiny("vit", _build("ViTForImageClassification", "ViT", **VISION, num_labels=5), _pixels(16), None, (("vision", 2),)),
        Tiny("resnet", _build("ResNetForImageClassification", "ResNet", embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1],
             layer_type="basic", num_labels=5), _pixels(16), None, (("vision", 2),)),
        Tiny("clip", _clip("CLIP"), lambda rng: {**_text(rng), **_pixels(16)(rng)}, None, (("text", 2), ("vision", 2))),
        Tiny("siglip", _clip("Siglip"), lambda rng: {**_text(rng), **_pixels(16)(rng)}, None, (("text", 2), ("vision", 2))),
        Tiny("ast", _build("ASTForAudioClassification", "AST", **BERT, patch_size=4, num_mel_bins=8, max_length=12,
             frequency_stride=4, time_stride=4, num_labels=5), _spectrogram, None, (("audio", 2),)),
        Tiny("whisper", _build("WhisperForConditionalGeneration", "Whisper", vocab_size=VOCAB, d_model=32, encoder_layers=2,
             decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
             num_mel_bins=8, max_source_positions=16, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             decoder_start_token_id=1), _whisper_inputs, "seq2seq", PAIR),
        Tiny("llava", _llava, _llava_inputs, "causal", (("vision", 2), ("decoder", 2))),
        Tiny("qwen2_vl", _qwen2_vl, _qwen2_vl_inputs, "causal", (("vision", 2), ("decoder", 2))),
        Tiny("unet", _unet, _unet_inputs, None, (("down", 2), ("mid", 1), ("up", 2)), "diffusers"),
        Tiny("dit", _dit, _dit_inputs, None, (("denoiser", 2),), "diffusers"),
        Tiny("sd3", _sd3, _sd3_inputs, None, (("denoiser", 2),), "diffusers"),
        Tiny("flux", _flux, _flux_inputs, None, (("denoiser", 1), ("single", 2)), "diffusers"),
    ]
}
