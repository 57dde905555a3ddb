"""CLIPs of transformers with the weights of open_clip's CLIPs, and a tokenizer, for the tests."""

from __future__ import annotations

import functools
import re

from tiny_clip import PATCH, SIDE, TEXT, VISION, tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

NAMES = [  # patterns of open_clip's names of weights, and transformers' names
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"^(token|position)(al)?_embedding(\.weight)?", r"text_model.embeddings.\1_embedding.weight"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"\.ln_(\d)", r".layer_norm\1"),
    (r"\.attn", ".self_attn"),
    (r"\.c_fc", ".fc1"),
    (r"\.c_proj", ".fc2"),
]


def copied(source, act="quick_gelu"):
    """Makes a CLIPModel of transformers with the weights and the dtype of open_clip's `source`."""
    common = dict(hidden_act=act, projection_dim=24)
    width, text_width = VISION["width"], TEXT["width"]
    vision = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len(source.visual.transformer.resblocks),
        num_attention_heads=width // VISION["head_width"],
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = dict(
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=TEXT["layers"],
        num_attention_heads=TEXT["heads"],
    )
    config = CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=24)
    weights = {}
    for name, value in source.state_dict().items():
        for pattern, renamed in NAMES:
            name = re.sub(pattern, renamed, name)
        if name.endswith("_proj_weight") or name.endswith("_proj_bias"):
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                weights[re.sub(r"in_proj_", f"{letter}_proj.", name)] = third
        elif name in ("visual.proj", "text_projection"):
            weights[name.replace("visual.proj", "visual_projection") + ".weight"] = value.T
        else:
            weights[name] = value
    model = CLIPModel(config).to(source.visual.proj.dtype)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def alone(model, kind):
    """Makes a model of the class `kind` from the vision tower of a CLIPModel."""
    vision = kind(model.config.vision_config).to(model.dtype).eval().requires_grad_(False)
    transformer = getattr(vision, "vision_model", vision)
    transformer.load_state_dict(model.vision_model.state_dict())
    if kind is CLIPVisionModelWithProjection:
        vision.visual_projection.load_state_dict(model.visual_projection.state_dict())
    return vision


@functools.cache
def their_tokenizer():
    """Returns transformers' tokenizer with the vocabulary of open_clip."""
    ours = tokenizer()
    end = "<end_of_text>"
    names = dict(bos_token="<start_of_text>", eos_token=end, pad_token=end, unk_token=end)
    return CLIPTokenizer(vocab=ours.encoder, merges=list(ours.bpe_ranks), **names)
