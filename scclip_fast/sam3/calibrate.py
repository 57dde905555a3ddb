"""Install the calibration in a frozen SAM3, remove it, and collect its results."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from .config import Sam3CalibrationConfig
from .state import ForwardState


class Calibration:
    """The calibration of one model, as `calibrate` returns it. It is a context manager.

    Attributes:
        config: the settings.
    """

    def __init__(
        self,
        config: Sam3CalibrationConfig,
        replacements: Iterable[tuple[nn.Module, type, dict[str, Any]]],
    ) -> None:
        self.config = config
        # Each module with its own class, the attributes added to it, and those they replaced.
        self._frozen: list[tuple[nn.Module, type, dict[str, Any], dict[str, Any]]] = []
        state = ForwardState(config)
        for module, kind, attributes in replacements:
            added = {"scclip": state, **attributes}
            replaced = {name: vars(module)[name] for name in added if name in vars(module)}
            self._frozen.append((module, type(module), added, replaced))
            _change_class(module, kind)
            vars(module).update(added)

    def remove(self) -> None:
        """Restore the model, bit for bit. A second call does nothing."""
        for module, kind, added, replaced in self._frozen:
            _change_class(module, kind)
            for name in added:
                del vars(module)[name]
            vars(module).update(replaced)
        self._frozen.clear()

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def calibrate(model: nn.Module, config: Sam3CalibrationConfig | None = None) -> Calibration:
    """Install the calibration in a frozen SAM3, until `remove` or the end of a `with` block.

        with calibrate(model):
            output = model(**processor(images=image, text="building", return_tensors="pt"))

    The model is the same object with the same weights, and it is called as before.

    transformers' `Sam3Model`: `vision_embeds` are calibrated once and reused across prompts.
    `output` has the fields of `CalibratedSegmentationOutput` besides transformers' own. Compile
    `vision_encoder`, `detr_encoder` and `mask_decoder`, as SAM3 itself allows, before or after.
    `trunk_fusion` runs the trunk's last layer twice, so `vision_attentions` has two entries for it;
    if its attention is blended, it has none.

    Meta's `Sam3Image`, called directly or by its `Sam3Processor`: `backbone.forward_image` and
    `forward_grounding` add `outlier_mask`, `lof_scores` and `calibrated_features` to their
    dictionaries, for each image. `forward_grounding` adds `query_features` and
    `decoder_reference_boxes` as well. All modules after the trunk, the interactive predictor
    included, read its calibrated output.

    Args:
        model: transformers' `Sam3Model`, for square images, with eager or sdpa attention; or the
            `Sam3Image` of Meta's package.
        config: None for `Sam3CalibrationConfig.for_depth` of the model's trunk.

    Returns:
        The handle whose `remove` restores the model.

    Raises:
        ValueError: the model is no SAM3 or is calibrated already, settings do not fit it, modules
            are of other classes or have a forward of their own (hooks of accelerate), or a
            `Sam3Image` has parts that a stage does not support (`meta.py` lists them).
        TypeError: config has another type, or a setting has.
    """
    package = adapter(model)
    if isinstance(model, package.CalibratedModel):
        raise ValueError("the model is calibrated already; call remove() on its handle first")
    if config is not None and not isinstance(config, Sam3CalibrationConfig):
        raise TypeError(
            f"config must be a Sam3CalibrationConfig or None, got {type(config).__name__}"
        )
    layers, decoder_layers = package.depths(model)
    config = Sam3CalibrationConfig.for_depth(layers) if config is None else config
    config.check(layers, decoder_layers)
    replacements = list(package.replacements(model, config))
    for module, kind, _ in replacements:
        _check_replaceable(module, kind)
    return Calibration(config, replacements)


def to_seed_dict(output: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary that the design document (10.1) asks for, from a calibrated model's output.

    Args:
        output: of a calibrated Sam3Model, or of `forward_grounding` of a calibrated Sam3Image.

    Returns:
        pred_logits: (L, B, 200, 256), the object queries after each of the L = 6 decoder layers
            (`query_features`); SAM3's classification logits are `output["pred_logits"]`.
        pred_boxes: (L, B, 200, 4), the reference boxes of each decoder layer as (cx, cy, w, h) in
            [0, 1]; the final boxes are `output["pred_boxes"]`.
        pred_masks: (B, 200, 288, 288) logits.
        semantic_seg: (B, 1, 288, 288) logits.
        presence_logit: (B, 1). The last three are None if a Sam3Image is built without them.
        outlier_indices: (M, 2) rows of (image, token), or None without `trunk_repair`.
        calibrated_features: (B, 5184, 1024), or None if the trunk is not calibrated.

    Raises:
        TypeError: the output is not that of a calibrated model.
    """
    if not isinstance(output, Mapping) or "query_features" not in output:
        raise TypeError(
            "output must be that of a calibrated Sam3Model or Sam3Image, got "
            f"{type(output).__name__}; call calibrate(model) first"
        )
    mask = output.get("outlier_mask")
    return dict(
        pred_logits=output["query_features"],
        pred_boxes=output["decoder_reference_boxes"],
        pred_masks=output.get("pred_masks"),
        semantic_seg=output.get("semantic_seg"),
        presence_logit=output.get("presence_logits", output.get("presence_logit_dec")),
        outlier_indices=None if mask is None else mask.flatten(1).nonzero(),
        calibrated_features=output.get("calibrated_features"),
    )


def adapter(model: nn.Module) -> ModuleType:
    """`huggingface` or `meta`, by the package of the model. Only that one is imported."""
    if isinstance(model, _if_imported("transformers.models.sam3.modeling_sam3", "Sam3Model")):
        from . import huggingface

        return huggingface
    if isinstance(model, _if_imported("sam3.model.sam3_image", "Sam3Image")):
        from . import meta

        return meta
    raise ValueError(
        "model must be a transformers Sam3Model or Meta's Sam3Image, got "
        f"{type(model).__name__}; if it is compiled, or transformers' video model, pass the model "
        "inside"
    )


def _if_imported(module: str, kind: str) -> type | tuple[()]:
    """A class of a module, or no class if nothing has imported the module."""
    return getattr(sys.modules.get(module), kind, ())


def _check_replaceable(module: nn.Module, kind: type) -> None:
    """ValueError unless a call of the module runs the forward of SAM3's own class."""
    sam3_class = type(module) if kind is type(module) else kind.__base__
    if type(module) is not sam3_class:
        raise ValueError(
            f"the calibration needs SAM3's own {sam3_class.__name__}, got {type(module)}"
        )
    forward = vars(module).get("forward")
    if forward is None or kind.forward is sam3_class.forward:
        return
    if getattr(forward, "__func__", None) is not sam3_class.forward:
        raise ValueError(
            f"the model's {sam3_class.__name__} has a forward that hides that of its class, as "
            "compile_mode and accelerate's hooks leave one: build the model without them, or "
            "remove them, and call its compile() instead"
        )


def _change_class(module: nn.Module, kind: type) -> None:
    """Set a module's class, and drop a `forward` on the instance that is its class's own.

    transformers 5.0 leaves such a `forward` on the instance after it has recorded outputs. It would
    be called instead of the new class's.
    """
    forward = vars(module).get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward
    module.__class__ = kind
