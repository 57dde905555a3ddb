"""SAM3 at its full size, 840 million random weights: shapes, and memory of the calibration.

`python tests/test_sam3_full.py` runs it frozen and with every stage on, in a process of its own.
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

TOKENS, WIDTH = 5184, 1024
MIB = 2**20
EVERYTHING = replace(Sam3CalibrationConfig(), **dict.fromkeys(STAGES, True))


def test_memory_of_the_trunk():
    """No (N, N, D) tensor, which would be 110 GB, and no more than twice N x N."""
    config = Sam3CalibrationConfig(trunk_attention=False)
    tokens = torch.randn(1, TOKENS, WIDTH)
    features = {role: torch.randn(1, TOKENS, WIDTH) for role in ("pre", "post", "levels")}

    def run():
        return calibrate_trunk(tokens, features, lambda x, _: x, (72, 72), config)

    run()
    found = measure(run)
    assert found.result[0].shape == (1, TOKENS, WIDTH) and found.result[1].mask.sum() == 260
    # 64 MiB of workspace, eight tensors of the tokens' size, and what the matrix library holds.
    assert found.peak_bytes is None or found.peak_bytes < (64 + 8 * 21 + 64) * MIB


@torch.inference_mode()
def results():
    """Peaks in bytes of the whole model and of its mask head, and what the calibrated one gives."""
    torch.manual_seed(0)
    model, head = Sam3Model(Sam3Config()).eval(), {}
    given = dict(
        pixel_values=torch.randn(1, 3, 1008, 1008), input_ids=torch.randint(3, 1000, (1, 32))
    )
    hook = model.mask_decoder.register_forward_pre_hook(
        lambda _, args, kwargs: head.update(kwargs), with_kwargs=True
    )
    peaks = {"model, frozen": measure(lambda: model(**given)).peak_bytes}
    hook.remove()
    peaks["head, frozen"] = measure(lambda: model.mask_decoder(**head)).peak_bytes
    with calibrate(model, EVERYTHING):
        peaks["head"] = measure(lambda: model.mask_decoder(**head)).peak_bytes
        head.clear()
        calibrated = measure(lambda: to_seed_dict(model(**given)))
    peaks["model"] = calibrated.peak_bytes
    return dict(
        peaks=peaks,
        shapes={name: value.shape for name, value in calibrated.result.items()},
        finite=all(value.isfinite().all().item() for value in calibrated.result.values()),
    )


@pytest.fixture(scope="module")
def found():
    if not os.environ.get("SCCLIP_FAST_FULL"):
        pytest.skip("takes minutes and 6 GB: SCCLIP_FAST_FULL=1")
    return output_of(__file__)


@pytest.mark.slow
def test_shapes_at_full_size(found):
    assert found["finite"]
    assert {name: tuple(shape) for name, shape in found["shapes"].items()} == dict(
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
