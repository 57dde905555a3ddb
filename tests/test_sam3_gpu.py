"""The SAM3 calibration on a GPU: moved there, compiled, and with attentions that need a GPU.

Different rounding can move a pair across a threshold or mark another token as an outlier. So errors
are relative to whole tensors, and tolerances are small beside the effect of the calibration.
"""

from dataclasses import replace

import pytest
import torch
from tiny_sam3 import ALL, inputs, tiny_sam3

from scclip_fast.sam3 import calibrate

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CONFIG = replace(ALL, mask_threshold=False)  # its logits jump to 0 below beta
TENSORS = ("calibrated_features", "pred_boxes", "pred_masks")


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """Convolutions are in float32, as on the CPU, and there are no gradients."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.no_grad():
        yield


def device_inputs(dtype=torch.float32):
    given = {name: tensor.to(DEVICE) for name, tensor in inputs(2).items()}
    return given | dict(pixel_values=given["pixel_values"].to(dtype))


def error(actual, expected):
    """The largest relative error of `TENSORS`."""

    def relative(name):
        a, b = (getattr(out, name).double().cpu() for out in (actual, expected))
        return ((a - b).norm() / b.norm()).item()

    return max(map(relative, TENSORS))


def test_moved_after_installing():
    """Moved to the GPU and back, the model has the CPU's results, and frozen ones after removal."""
    model, given = tiny_sam3(), inputs(2)
    frozen = model(**given)
    with calibrate(model, CONFIG):
        expected = model(**given)
        model.to(DEVICE)
        out = model(**{name: tensor.to(DEVICE) for name, tensor in given.items()})
        assert out.calibrated_features.device.type == DEVICE
        assert torch.equal(out.outlier_mask.cpu(), expected.outlier_mask)
        assert error(out, expected) < 1e-2
        model.to("cpu")
        assert torch.equal(model(**given).pred_masks, expected.pred_masks)
    assert torch.equal(model(**given).pred_masks, frozen.pred_masks)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-2), (torch.bfloat16, 0.1)])
def test_compiled(dtype, tolerance):
    """`vision_encoder` and `mask_decoder` compile to one graph each."""
    torch.compiler.reset()
    model, given = tiny_sam3().to(DEVICE, dtype), device_inputs(dtype)
    with calibrate(model, CONFIG):
        expected = model(**given)
        for module in (model.vision_encoder, model.mask_decoder):
            module.compile(fullgraph=True)
        assert error(model(**given), expected) < tolerance


@pytest.mark.parametrize(
    "attention, dtype, tolerance",
    [("flex_attention", torch.float32, 1e-2), ("flash_attention_2", torch.bfloat16, 0.1)],
)
def test_other_attention_implementations(attention, dtype, tolerance):
    given = device_inputs(dtype)
    try:  # heads of 16 channels, the fewest that these implementations take
        model = tiny_sam3(attention, heads=2).to(DEVICE, dtype)
        model(**given)
    except Exception as reason:
        pytest.skip(f"transformers itself does not run {attention} here: {reason}")
    reference = tiny_sam3(heads=2).to(DEVICE, dtype)
    with calibrate(model, CONFIG), calibrate(reference, CONFIG):
        assert error(model(**given), reference(**given)) < tolerance
    assert model.config._attn_implementation == attention
