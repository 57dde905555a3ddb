"""The SAM3 plug-in on a GPU: moved there, compiled, and by attentions that a CPU does not run.

Where rounding differs, a pair may fall on the other side of a threshold and an outlier be another
token: errors are of whole tensors, and beside what the calibration itself moves.
"""

from dataclasses import replace

import pytest
import torch
from tiny_sam3 import ALL, inputs, tiny_sam3

from scclip_fast.sam3 import calibrate

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
STAGES = replace(ALL, mask_threshold=False)  # a logit that falls below beta jumps to 0
TENSORS = ("calibrated_features", "pred_boxes", "pred_masks")


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """Convolutions in float32, as on the CPU, and no gradients."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.no_grad():
        yield


def given(dtype=torch.float32):
    found = {name: tensor.to(DEVICE) for name, tensor in inputs(2).items()}
    return found | dict(pixel_values=found["pixel_values"].to(dtype))


def error(found, expected):
    """The largest relative error of `TENSORS`."""

    def relative(name):
        a, b = (getattr(out, name).double().cpu() for out in (found, expected))
        return ((a - b).norm() / b.norm()).item()

    return max(map(relative, TENSORS))


def test_moved_after_installing():
    """To the GPU and back: the CPU's results on both, and the frozen ones after removal."""
    model, pixels = tiny_sam3(), inputs(2)
    frozen = model(**pixels)
    with calibrate(model, STAGES):
        expected = model(**pixels)
        model.to(DEVICE)
        found = model(**{name: tensor.to(DEVICE) for name, tensor in pixels.items()})
        assert found.calibrated_features.device.type == DEVICE
        assert torch.equal(found.outlier_mask.cpu(), expected.outlier_mask)
        assert error(found, expected) < 1e-2
        model.to("cpu")
        assert torch.equal(model(**pixels).pred_masks, expected.pred_masks)
    assert torch.equal(model(**pixels).pred_masks, frozen.pred_masks)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-2), (torch.bfloat16, 0.1)])
def test_compiled(dtype, limit):
    """`vision_encoder` and `mask_decoder`, in one graph each."""
    torch.compiler.reset()
    model, pixels = tiny_sam3().to(DEVICE, dtype), given(dtype)
    with calibrate(model, STAGES):
        expected = model(**pixels)
        for part in (model.vision_encoder, model.mask_decoder):
            part.compile(fullgraph=True)
        assert error(model(**pixels), expected) < limit


@pytest.mark.parametrize(
    "attention, dtype, limit",
    [("flex_attention", torch.float32, 1e-2), ("flash_attention_2", torch.bfloat16, 0.1)],
)
def test_other_attention_implementations(attention, dtype, limit):
    pixels = given(dtype)
    try:  # with heads of 16 channels, the fewest that these take
        model = tiny_sam3(attention, heads=2).to(DEVICE, dtype)
        model(**pixels)
    except Exception as reason:
        pytest.skip(f"transformers itself does not run {attention} here: {reason}")
    reference = tiny_sam3(heads=2).to(DEVICE, dtype)
    with calibrate(model, STAGES), calibrate(reference, STAGES):
        assert error(model(**pixels), reference(**pixels)) < limit
    assert model.config._attn_implementation == attention
