"""Shapes and memory of the calibration at SAM3's full size, with 840 million random weights.

`python tests/test_sam3_full.py` runs the model frozen and with every stage, in its own process.
"""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from measure import measure
from own_process import output_of
from transformers import Sam3Config, Sam3Model

from scclip_fast.sam3 import Sam3CalibrationConfig, calibrate, to_seed_dict
from scclip_fast.sam3.config import STAGES
from scclip_fast.sam3.stages import calibrate_trunk
from scclip_fast.sam3.state import ForwardState

TOKENS, WIDTH = 5184, 1024
MIB = 2**20
EVERYTHING = replace(Sam3CalibrationConfig(), **dict.fromkeys(STAGES, True))


@pytest.mark.slow
def test_memory_of_the_trunk():
    """There is no (N, N, D) tensor, which would be 110 GB, and at most the memory of two N x N."""
    config = Sam3CalibrationConfig(trunk_attention=False)
    x = torch.randn(1, 72, 72, WIDTH)
    kept = {name: torch.randn(1, TOKENS, WIDTH) for name in ("pre", "post", "level_sum")}

    def run():
        state = ForwardState(config, **kept)
        return calibrate_trunk(x, lambda x, _: x, state), state.outlier_mask

    run()
    measured = measure(run)
    y, outlier_mask = measured.result
    assert y.shape == x.shape and outlier_mask.sum() == 260
    # 64 MiB of workspace, eight tensors of the tokens' size, and 64 MiB for the matrix library.
    assert measured.peak_bytes is None or measured.peak_bytes < (64 + 8 * 21 + 64) * MIB


@torch.inference_mode()
def results():
    """Peaks in bytes of the model and of its mask head, and the calibrated model's results."""
    torch.manual_seed(0)
    model, head = Sam3Model(Sam3Config()).eval(), {}
    inputs = dict(
        pixel_values=torch.randn(1, 3, 1008, 1008), input_ids=torch.randint(3, 1000, (1, 32))
    )
    hook = model.mask_decoder.register_forward_pre_hook(
        lambda _, args, kwargs: head.update(kwargs), with_kwargs=True
    )
    peaks = {"model, frozen": measure(lambda: model(**inputs)).peak_bytes}
    hook.remove()
    peaks["head, frozen"] = measure(lambda: model.mask_decoder(**head)).peak_bytes
    with calibrate(model, EVERYTHING):
        peaks["head"] = measure(lambda: model.mask_decoder(**head)).peak_bytes
        head.clear()
        calibrated = measure(lambda: to_seed_dict(model(**inputs)))
    peaks["model"] = calibrated.peak_bytes
    return dict(
        peaks=peaks,
        shapes={name: value.shape for name, value in calibrated.result.items()},
        finite=all(value.isfinite().all().item() for value in calibrated.result.values()),
    )


@pytest.fixture(scope="module")
def full_size():
    if not os.environ.get("SCCLIP_FAST_FULL"):
        pytest.skip("takes minutes and 6 GB: SCCLIP_FAST_FULL=1")
    return output_of(__file__)


@pytest.mark.slow
def test_shapes_at_full_size(full_size):
    assert full_size["finite"]
    assert {name: tuple(shape) for name, shape in full_size["shapes"].items()} == dict(
        pred_logits=(6, 1, 200, 256),
        pred_boxes=(6, 1, 200, 4),
        pred_masks=(1, 200, 288, 288),
        semantic_seg=(1, 1, 288, 288),
        presence_logit=(1, 1),
        outlier_indices=(260, 2),
        calibrated_features=(1, TOKENS, WIDTH),
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(results()))
