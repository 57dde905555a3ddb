"""A small transformers SAM3 with random weights: 64 tokens in its trunk, 40 object queries."""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import CLIPTokenizer, Sam3Config, Sam3Model, Sam3Processor

from scclip_fast.sam3 import Sam3CalibrationConfig
from scclip_fast.sam3.config import STAGES

SIDE, PATCH, LAYERS, QUERIES = 64, 8, 6, 40
GRID = SIDE // PATCH
ALL = replace(Sam3CalibrationConfig.for_depth(LAYERS), **dict.fromkeys(STAGES, True))
NONE = replace(ALL, **dict.fromkeys(STAGES, False))

TRUNK = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=PATCH,
    window_size=4,
    global_attn_indexes=[2, 5],
    pretrain_image_size=32,
)


def tiny_sam3(attention: str = "sdpa", heads: int = 4) -> Sam3Model:
    """A frozen model in evaluation mode, with the same weights on every call.

    heads: number of heads in all modules but the trunk, which have 32 channels.
    """
    small = dict(hidden_size=32, intermediate_size=48, num_attention_heads=heads, dropout=0.0)
    config = Sam3Config(
        vision_config=dict(
            backbone_config=dict(model_type="sam3_vit_model", **TRUNK),
            fpn_hidden_size=32,
            backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        ),
        text_config=dict(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            projection_dim=32,
            bos_token_id=1,
            eos_token_id=2,
        ),
        geometry_encoder_config=dict(num_layers=1, **small),
        detr_encoder_config=dict(num_layers=2, **small),
        detr_decoder_config=dict(num_layers=3, num_queries=QUERIES, **small),
        mask_decoder_config=dict(hidden_size=32, num_attention_heads=heads, dropout=0.0),
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Sam3Model(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def inputs(batch: int = 1, prompt: int = 7) -> dict[str, torch.Tensor]:
    """Images and prompts, whose last two tokens are padding."""
    tokens = torch.randint(3, 100, (batch, prompt))
    mask = torch.ones(batch, prompt, dtype=torch.long)
    mask[:, -2:] = 0
    pixels = torch.randn(batch, 3, SIDE, SIDE)
    return dict(pixel_values=pixels, input_ids=tokens, attention_mask=mask)


def tiny_processor(side: int = SIDE) -> Sam3Processor:
    """A processor whose vocabulary is the letters, for square inputs of `side` pixels."""
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    # transformers 5.0 has the class under its older name.
    name = "Sam3ImageProcessor" + ("" if hasattr(transformers, "Sam3ImageProcessor") else "Fast")
    images = getattr(transformers, name)(size={"height": side, "width": side})
    return Sam3Processor(images, tokenizer)


def save_tiny_sam3(folder: Path) -> Path:
    """Saves the model and its processor to a folder, as a download does. Returns the folder."""
    tiny_sam3().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder
