"""The calibration of a full-size SAM3 (840 M parameters, random weights) beside the frozen model.

Shapes are (B, H, W): one image of 1008 pixels, 5184 tokens in the trunk. The vision encoder runs
once an image, the other parts once a prompt. The mask head, where 82,944 pixels are repaired, also
runs alone, on its inputs in the frozen model.
"""

from __future__ import annotations

from collections.abc import Callable
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
    "mask_repair, tokens": with_stages("mask_repair", mask_grid="tokens"),
    "mask_repair, pixels": with_stages("mask_repair"),
    "mask_threshold": with_stages("mask_threshold"),
}
WHOLE = {
    "all trunk stages": TRUNK["all trunk stages"],
    "decoder_calibration": with_stages("decoder_calibration"),
    **HEAD,
    "everything": with_stages(*STAGES),
}


@cache
def loaded(device: str, dtype: str):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    model = transformers.Sam3Model(transformers.Sam3Config())
    return model.to(device, getattr(torch, dtype)).eval().requires_grad_(False)


@cache
def model_inputs(device: str, dtype: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(SHAPE[0], 3, *SHAPE[1:], generator=generator)
    tokens = torch.randint(3, 1000, (SHAPE[0], 32), generator=generator)
    return dict(pixel_values=pixels.to(device, getattr(torch, dtype)), input_ids=tokens.to(device))


def installed(model, config: Sam3CalibrationConfig | None):
    return nullcontext() if config is None else calibrate(model, config)


@torch.inference_mode()
def encode(model, inputs: dict[str, Tensor]) -> Tensor:
    """Runs the vision encoder, as once an image."""
    return model.vision_encoder(inputs["pixel_values"]).last_hidden_state


@torch.inference_mode()
def segment(model, inputs: dict[str, Tensor]) -> Tensor:
    """Runs the whole model: an image and a prompt to masks."""
    return model(**inputs).pred_masks


@cache
@torch.inference_mode()
def head_inputs(device: str, dtype: str) -> dict[str, Tensor]:
    """Returns the inputs of the mask head in a forward pass of the frozen model."""
    model, inputs = loaded(device, dtype), {}
    hook = model.mask_decoder.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.update(kwargs), with_kwargs=True
    )
    model(**model_inputs(device, dtype))
    hook.remove()
    return inputs


@torch.inference_mode()
def decode(model, inputs: dict[str, Tensor]) -> Tensor:
    """Runs the mask head alone."""
    return model.mask_decoder(**inputs).pred_masks


RUNS = {
    "vision_encoder": (encode, model_inputs),
    "sam3": (segment, model_inputs),
    "mask_head": (decode, head_inputs),
}
CONFIGS = {
    "vision_encoder": {"frozen": None} | TRUNK,
    "sam3": {"frozen": None} | WHOLE,
    "mask_head": {"frozen": None} | HEAD,
}


def call(op: str, device: str, dtype: str) -> Callable[[], Tensor]:
    """Returns the call to time. Make it before a config is installed: it runs the frozen model"""
    run, inputs = RUNS[op]
    return partial(run, loaded(device, dtype), inputs(device, dtype))


def _cases(op: str) -> list:
    names = dict.fromkeys(CONFIGS[op])
    return harness.cases({"cpu": names, "cuda": names}, "bfloat16", shapes=(SHAPE,))


def _race(op: str, device: str, dtype: str, provider: str, race: Callable) -> None:
    timed = call(op, device, dtype)
    with installed(loaded(device, dtype), CONFIGS[op][provider]):
        race(timed, check=None)


@pytest.mark.parametrize(harness.ARGUMENTS, _cases("vision_encoder"))
def test_vision_encoder(device, shape, dtype, provider, race):
    _race("vision_encoder", device, dtype, provider, race)


@pytest.mark.parametrize(harness.ARGUMENTS, _cases("sam3"))
def test_sam3(device, shape, dtype, provider, race):
    _race("sam3", device, dtype, provider, race)


@pytest.mark.parametrize(harness.ARGUMENTS, _cases("mask_head"))
def test_mask_head(device, shape, dtype, provider, race):
    _race("mask_head", device, dtype, provider, race)
