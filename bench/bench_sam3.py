"""The calibration of a full-size SAM3 (840 M parameters, random weights) beside the frozen model.

Shapes are (B, H, W): one image of 1008 pixels, 5184 tokens in the trunk. The vision encoder is run
once an image, the rest once a prompt; the mask head's repair, of 82,944 pixels, is on its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial

import harness
import pytest
import torch
from torch import Tensor

from scclip_fast.sam3 import Sam3CalibrationConfig, calibrate
from scclip_fast.sam3.config import STAGES, TRUNK_STAGES

SHAPE = (1, 1008, 1008)
NONE = replace(Sam3CalibrationConfig(), **dict.fromkeys(STAGES, False))


def with_stages(*names: str, **settings) -> Sam3CalibrationConfig:
    return replace(NONE, **dict.fromkeys(names, True), **settings)


TRUNK = {name: with_stages(name) for name in TRUNK_STAGES} | {
    "all trunk stages": with_stages(*TRUNK_STAGES)
}
HEAD = {
    "decoder_calibration": with_stages("decoder_calibration"),
    "mask_repair, tokens": with_stages("mask_repair", mask_grid="tokens"),
    "mask_repair, pixels": with_stages("mask_repair"),
    "mask_threshold": with_stages("mask_threshold"),
    "everything": with_stages(*STAGES),
}


@cache
def loaded(device: str, dtype: str):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    model = transformers.Sam3Model(transformers.Sam3Config())
    return model.to(device, getattr(torch, dtype)).eval().requires_grad_(False)


@cache
def given(device: str, dtype: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(SHAPE[0], 3, *SHAPE[1:], generator=generator)
    tokens = torch.randint(3, 1000, (SHAPE[0], 32), generator=generator)
    return dict(pixel_values=pixels.to(device, getattr(torch, dtype)), input_ids=tokens.to(device))


def installed(model, config: Sam3CalibrationConfig | None):
    return nullcontext() if config is None else calibrate(model, config)


@torch.inference_mode()
def encode(model, inputs: dict[str, Tensor]) -> Tensor:
    """The vision encoder, once an image."""
    return model.vision_encoder(inputs["pixel_values"]).last_hidden_state


@torch.inference_mode()
def segment(model, inputs: dict[str, Tensor]) -> Tensor:
    """Image and prompt to masks."""
    return model(**inputs).pred_masks


CONFIGS = {"vision_encoder": {"frozen": None} | TRUNK, "sam3": {"frozen": None} | HEAD}


def _cases(op: str) -> list:
    names = dict.fromkeys(CONFIGS[op])
    return harness.cases({"cpu": names, "cuda": names}, "bfloat16", shapes=(SHAPE,))


@pytest.mark.parametrize(harness.ARGUMENTS, _cases("vision_encoder"))
def test_vision_encoder(device, shape, dtype, provider, race):
    model = loaded(device, dtype)
    with installed(model, CONFIGS["vision_encoder"][provider]):
        race(partial(encode, model, given(device, dtype)), check=None)


@pytest.mark.parametrize(harness.ARGUMENTS, _cases("sam3"))
def test_sam3(device, shape, dtype, provider, race):
    model = loaded(device, dtype)
    with installed(model, CONFIGS["sam3"][provider]):
        race(partial(segment, model, given(device, dtype)), check=None)
