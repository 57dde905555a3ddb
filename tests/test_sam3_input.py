"""The presets of the SAM3 calibration, and the settings, models and input that it refuses."""

from dataclasses import replace

import pytest
import torch
from tiny_sam3 import ALL, inputs, tiny_sam3
from transformers import Sam3Model

from scclip_fast.sam3 import Sam3CalibrationConfig, calibrate


@pytest.fixture
def model():
    return tiny_sam3()


def test_presets():
    default, seed = Sam3CalibrationConfig(), Sam3CalibrationConfig.seed()
    assert Sam3CalibrationConfig.for_depth(32) == default
    assert (seed.pre_adjust_idx, seed.post_adjust_idx) == (6, 2)
    assert (seed.multi_start_idx, seed.multi_end_idx, seed.similarity_beta) == (2, 8, 0.4)
    for layers in range(2, 50):
        Sam3CalibrationConfig.for_depth(layers).check(layers, 6)


BAD = [
    (dict(pre_adjust_idx=5), r"pre_adjust_idx must be in \[0, 4\] .*for_depth\(6\).*, got 5"),
    (dict(post_adjust_idx=-1), r"post_adjust_idx must be in"),
    (dict(multi_start_idx=9), r"multi_start_idx must be in"),
    (dict(multi_start_idx=3, multi_end_idx=3), r"multi_end_idx must be in \[4, 5\]"),
    (dict(multi_start_idx=3, multi_end_idx=2), r"multi_end_idx must be in \[4, 5\]"),
    (dict(multi_end_idx=6), r"multi_end_idx must be in .*, got 6"),
    (dict(similarity_beta=1.5), r"similarity_beta must be a finite number in \[-1, 1\], got 1.5"),
    (dict(similarity_beta=-1.01), r"similarity_beta must be a finite number in \[-1, 1\]"),
    (dict(similarity_beta=float("nan")), r"similarity_beta must be a finite number in .*, got nan"),
    (dict(residual_weight=-0.1), r"residual_weight must be a finite number in \[0, 1\]"),
    (dict(gamma=-1.0), r"gamma must be a finite number in \[0, "),
    (dict(gamma=float("inf")), r"gamma must be a finite number in \[0, .*, got inf"),
    (dict(outlier_contamination=0.6), r"outlier_contamination must be in \(0, 0.5\], got 0.6"),
    (dict(outlier_n_neighbors=0), r"outlier_n_neighbors must be at least 1"),
    (dict(outlier_score="lpf"), r"outlier_score must be 'lof', 'norm' or 'either', got 'lpf'"),
    (dict(decoder_layers=(3,)), r"decoder_layers must be in \[-3, 2\]"),
    (dict(mask_grid="boxes"), r"mask_grid must be 'pixels' or 'tokens', got 'boxes'"),
]


@pytest.mark.parametrize("settings, message", BAD)
def test_bad_settings(model, settings, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model, replace(ALL, **settings))
    assert type(model) is Sam3Model


WRONG_TYPES = [
    (dict(pre_adjust_idx=2.5), "pre_adjust_idx must be an int, got float"),
    (dict(outlier_n_neighbors=30.5), "outlier_n_neighbors must be an int, got float"),
    (dict(similarity_beta="0.4"), "similarity_beta must be a number, got str"),
    (dict(trunk_repair="no"), "trunk_repair must be True or False, got 'no'"),
    (dict(decoder_layers=-1), "decoder_layers must be a tuple, got -1"),
]


@pytest.mark.parametrize("settings, message", WRONG_TYPES)
def test_settings_of_another_type(model, settings, message):
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=message):
        calibrate(model, replace(ALL, **settings))
    with pytest.raises(TypeError, match="config must be a Sam3CalibrationConfig or None, got dict"):
        calibrate(model, settings)
    assert [type(module) for module in model.modules()] == kinds


def test_bad_models(model):
    with pytest.raises(ValueError, match="or Meta's Sam3Image, got Sam3VisionModel"):
        calibrate(model.vision_encoder)
    with calibrate(model), pytest.raises(ValueError, match=r"calibrated already; call remove"):
        calibrate(model)
    with pytest.raises(ValueError, match="at least 2 layers, got a trunk of 1"):
        Sam3CalibrationConfig.for_depth(1)


def test_forwards_that_a_class_cannot_replace(model):
    """A user's subclass is refused, and so is a module with a forward that a library's hook set."""

    class Mine(Sam3Model):
        pass

    model.__class__ = Mine
    with pytest.raises(ValueError, match=r"needs SAM3's own Sam3Model, got .*Mine"):
        calibrate(model)
    model.__class__ = Sam3Model
    last = model.vision_encoder.backbone.layers[-1]
    original = last.forward
    last.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(ValueError, match=r"Sam3ViTLayer has a forward that hides .* accelerate"):
        calibrate(model)
    assert type(model) is Sam3Model


def test_nan_pixels(model):
    given = inputs(1)
    given["pixel_values"][0, 0, 0, 0] = torch.nan
    with calibrate(model):
        with pytest.raises(ValueError, match="pixel_values must be finite"):
            model(**given)
        with pytest.raises(ValueError, match="pixel_values must be finite"):
            model.get_vision_features(pixel_values=given["pixel_values"])
