"""Install the calibration in a frozen SAM3 and take it out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn
from transformers import AttentionInterface, PreTrainedModel, Sam3Model
from transformers.modeling_utils import _CAN_RECORD_REGISTRY

from . import modules
from .config import Sam3CalibrationConfig

AttentionInterface.register(modules.ATTENTION, modules.blended)


class Calibration:
    """What `calibrate` installed in a model; also a context manager.

    Attributes:
        config: its settings.
    """

    def __init__(self, model: Sam3Model, config: Sam3CalibrationConfig) -> None:
        self.config = config
        self._changed: list[tuple[nn.Module, type]] = []
        self._attention: tuple[nn.Module, object] | None = None
        shared = modules.Shared(config)
        for module, kind, index in list(_replacements(model, config)):
            self._changed.append((module, type(module)))
            _unshadow(module)
            module.__class__ = kind
            if isinstance(module, PreTrainedModel):
                # By the name of its class transformers knows what a model can record; a name that
                # is missing would lose hidden states and attentions without a word.
                _CAN_RECORD_REGISTRY[str(kind)] = module._can_record_outputs
            module.scclip = shared
            if index is not None:
                module.scclip_index = index
        if config.calibrates_trunk and config.trunk_attention:
            self._use_blended(model.vision_encoder.backbone.layers[-1].attention)

    def _use_blended(self, attention: nn.Module) -> None:
        self._attention = attention, attention.config
        attention.config = copy.copy(attention.config)  # all layers of the trunk share one
        attention.config._attn_implementation = modules.ATTENTION

    def remove(self) -> None:
        """Restore the model, bit for bit; again, it does nothing."""
        for module, kind in self._changed:
            _unshadow(module)
            module.__class__ = kind
            del module.scclip
            module.__dict__.pop("scclip_index", None)
        self._changed.clear()
        if self._attention is not None:
            attention, attention.config = self._attention
            self._attention = None

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def calibrate(model: Sam3Model, config: Sam3CalibrationConfig | None = None) -> Calibration:
    """Install the calibration in a frozen SAM3, until `remove` or the end of a `with` block.

        with calibrate(model):
            output = model(**processor(images=image, text="building", return_tensors="pt"))

    The model is the same object with the same weights, and so are its calls: `vision_embeds` are
    calibrated once and reused across prompts; `output` has the fields of
    `CalibratedSegmentationOutput` besides transformers' own. Compile `vision_encoder`,
    `detr_encoder` and `mask_decoder`, as SAM3 itself allows, before or after. In
    `vision_attentions` the trunk's last layer, which `trunk_fusion` runs twice, comes twice, or,
    where its attention is blended, not at all.

    Args:
        model: transformers' `Sam3Model`, square images, eager or sdpa attention.
        config: None for `Sam3CalibrationConfig.for_depth` of its trunk.

    Returns:
        The handle to remove it by.

    Raises:
        ValueError: another model, one that is calibrated already, or settings that don't fit it.
        TypeError: settings of another type.
    """
    if not isinstance(model, Sam3Model):
        raise ValueError(
            f"model must be a transformers Sam3Model, got {type(model).__name__}; of a video model "
            "or a compiled one, pass the Sam3Model inside"
        )
    if isinstance(model, modules.CalibratedModel):
        raise ValueError("the model is calibrated already; call remove() on its handle first")
    if config is not None and not isinstance(config, Sam3CalibrationConfig):
        raise TypeError(
            f"config must be a Sam3CalibrationConfig or None, got {type(config).__name__}"
        )
    layers = len(model.vision_encoder.backbone.layers)
    config = Sam3CalibrationConfig.for_depth(layers) if config is None else config
    config.check(layers, len(model.detr_decoder.layers))
    return Calibration(model, config)


def _unshadow(module: nn.Module) -> None:
    """Drop a `forward` of the instance that is only its class's own.

    transformers 5.0 leaves one behind when it has recorded outputs; it would outlive the class.
    """
    forward = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward


def _replacements(
    model: Sam3Model, config: Sam3CalibrationConfig
) -> Iterator[tuple[nn.Module, type, int | None]]:
    """Each module that a stage needs, the class it becomes, and a trunk layer's index."""
    yield model, modules.CalibratedModel, None
    yield model.vision_encoder, modules.CalibratedVisionModel, None
    yield model.detr_decoder, modules.TappedDecoder, None
    if config.calibrates_trunk:
        layers = model.vision_encoder.backbone.layers
        tapped = {config.pre_adjust_idx, config.post_adjust_idx}
        tapped |= set(range(config.multi_start_idx, config.multi_end_idx))
        for index in sorted(tapped):
            yield layers[index], modules.TappedLayer, index
        yield layers[-1], modules.CalibratedLastLayer, None
    if config.decoder_calibration:
        layers = model.detr_decoder.layers
        for index in sorted({i % len(layers) for i in config.decoder_layers}):
            yield layers[index], modules.CalibratedDecoderLayer, None
    head = model.mask_decoder
    if config.mask_repair and config.mask_grid == "tokens":
        yield head.pixel_decoder, modules.RepairedPixelDecoder, None
    if config.mask_threshold or (config.mask_repair and config.mask_grid == "pixels"):
        yield head.instance_projection, modules.CalibratedProjection, None
    if config.mask_threshold:
        yield head.mask_embedder, modules.MeasuredMaskEmbedder, None
        yield head, modules.ThresholdedMaskDecoder, None
