"""SAM3 at its full size, 840 million random weights: shapes, and memory of the calibration."""

import os

import pytest
import torch
from transformers import Sam3Config, Sam3Model

from scclip_fast.measure import measure
from scclip_fast.sam3 import Sam3CalibrationConfig, calibrate, to_seed_dict
from scclip_fast.sam3.stages import calibrate_trunk

TOKENS, WIDTH = 5184, 1024
MIB = 2**20


def test_memory_of_the_trunk():
    """No (N, N, D) tensor, which would be 110 GB, and no more than twice N x N."""
    config = Sam3CalibrationConfig(trunk_attention=False)
    features = {i: torch.randn(1, TOKENS, WIDTH) for i in (7, 15, 23)}
    features |= {i: features[15] for i in range(16, 23)}

    def run():
        return calibrate_trunk(features[15], features, lambda x, _: x, (72, 72), config)

    run()
    found = measure(run)
    assert found.result[0].shape == (1, TOKENS, WIDTH) and found.result[1].mask.sum() == 260
    # 64 MiB of workspace, eight tensors of the tokens' size, and what the matrix library holds.
    assert found.peak_bytes is None or found.peak_bytes < (64 + 8 * 21 + 64) * MIB


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("SCCLIP_FAST_FULL"), reason="takes minutes and 6 GB: SCCLIP_FAST_FULL=1"
)
@torch.inference_mode()
def test_shapes_at_full_size():
    torch.manual_seed(0)
    model = Sam3Model(Sam3Config()).eval()
    given = dict(
        pixel_values=torch.randn(1, 3, 1008, 1008), input_ids=torch.randint(3, 1000, (1, 32))
    )
    with calibrate(model):
        found = to_seed_dict(model(**given))
    outliers = found.pop("outlier_indices")
    assert {name: tuple(value.shape) for name, value in found.items()} == dict(
        pred_logits=(6, 1, 200, 256),
        pred_boxes=(6, 1, 200, 4),
        pred_masks=(1, 200, 288, 288),
        semantic_seg=(1, 1, 288, 288),
        presence_logit=(1, 1),
        calibrated_features=(1, TOKENS, WIDTH),
    )
    assert outliers.shape == (260, 2)
    assert all(value.isfinite().all() for value in found.values())
