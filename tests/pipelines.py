"""A Stable-Diffusion-shaped pipeline at tiny width with random weights, built from its configs and saved as diffusers does."""

import itertools
import string
from pathlib import Path

import torch
from torch import nn


def clip_tokenizer(length: int = 16):
    """CLIP's scheme, byte pairs with an end of word, over merges made here: all words of two letters, and a few longer."""
    from transformers import CLIPTokenizer

    chars = string.ascii_lowercase
    vocab = {c: i for i, c in enumerate([*chars, *(c + "</w>" for c in chars)])}
    merges = []
    for a, b in itertools.product("abdegortsn", "abdegortsnkz"):
        merges.append((a, b + "</w>"))
        vocab[f"{a}{b}</w>"] = len(vocab)
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab, merges, model_max_length=length)


def stable_diffusion(folder: Path, seed: int = 0) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    words = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2)  # fmt: skip
    codec = AutoencoderKL(
        block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=12, max_position_embeddings=16, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id)  # fmt: skip
    text = CLIPTextModel(config)
    for module in (unet, codec, text):  # biases and norms away from zero and one, so that no mistake hides behind them
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.05 * torch.randn_like(p))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=1)  # fmt: skip
    made = StableDiffusionPipeline(codec, text, words, unet, scheduler, None, None, requires_safety_checker=False)
    made.save_pretrained(folder, safe_serialization=True)
    return folder


def photos(folder: Path, n: int = 4) -> Path:
    """Pictures of any size, as a user's folder holds them."""
    from temperament.engine.pictures import png_bytes

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        smooth = nn.functional.interpolate(torch.rand(1, 3, 3, 3), (24 + i, 20), mode="bilinear")[0]
        (folder / f"photo-{i}.png").write_bytes(png_bytes(smooth))
    return folder
