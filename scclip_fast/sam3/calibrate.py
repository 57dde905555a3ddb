"""Install the calibration in a frozen SAM3 and take it out again."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from torch import nn

from .config import Sam3CalibrationConfig
from .state import Shared


class Calibration:
    """What `calibrate` installed in a model; also a context manager.

    Attributes:
        config: its settings.
    """

    def __init__(
        self,
        config: Sam3CalibrationConfig,
        replacements: Iterable[tuple[nn.Module, type, dict[str, Any]]],
    ) -> None:
        self.config = config
        self._before: list[tuple[nn.Module, type, dict[str, Any], dict[str, Any]]] = []
        shared = Shared(config)
        for module, kind, attributes in replacements:
            added = {"scclip": shared, **attributes}
            covered = {name: vars(module)[name] for name in added if name in vars(module)}
            self._before.append((module, type(module), added, covered))
            _become(module, kind)
            vars(module).update(added)

    def remove(self) -> None:
        """Restore the model, bit for bit; again, it does nothing."""
        for module, kind, added, covered in self._before:
            _become(module, kind)
            for name in added:
                del vars(module)[name]
            vars(module).update(covered)
        self._before.clear()

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def calibrate(model: nn.Module, config: Sam3CalibrationConfig | None = None) -> Calibration:
    """Install the calibration in a frozen SAM3, until `remove` or the end of a `with` block.

        with calibrate(model):
            output = model(**processor(images=image, text="building", return_tensors="pt"))

    The model is the same object with the same weights, and so are its calls: `vision_embeds` are
    calibrated once and reused across prompts; `output` has the fields of
    `CalibratedSegmentationOutput` besides transformers' own. Compile `vision_encoder`,
    `detr_encoder` and `mask_decoder`, as SAM3 itself allows, before or after. In
    `vision_attentions` the trunk's last layer, which `trunk_fusion` runs twice, comes twice, or,
    where its attention is blended, not at all.

    Meta's `Sam3Image` is called as ever, by its `Sam3Processor` too: `backbone.forward_image` and
    `forward_grounding` add `outlier_mask`, `lof_scores` and `calibrated_features` to their
    dictionaries, for each image, and the latter `query_features` and `decoder_reference_boxes`.
    What comes after the trunk sees it calibrated, the interactive predictor too.

    Args:
        model: transformers' `Sam3Model`, square images, eager or sdpa attention; or the
            `Sam3Image` of Meta's package.
        config: None for `Sam3CalibrationConfig.for_depth` of its trunk.

    Returns:
        The handle to remove it by.

    Raises:
        ValueError: another model, one that is calibrated already, settings that don't fit it,
            modules of other classes or with a forward of their own (hooks of accelerate), or parts
            of a `Sam3Image` that a stage has no place in (`meta.py` lists them).
        TypeError: settings of another type.
    """
    adapter = _adapter(model)
    if isinstance(model, adapter.CalibratedModel):
        raise ValueError("the model is calibrated already; call remove() on its handle first")
    if config is not None and not isinstance(config, Sam3CalibrationConfig):
        raise TypeError(
            f"config must be a Sam3CalibrationConfig or None, got {type(config).__name__}"
        )
    layers, decoder_layers = adapter.depths(model)
    config = Sam3CalibrationConfig.for_depth(layers) if config is None else config
    config.check(layers, decoder_layers)
    replacements = list(adapter.replacements(model, config))
    for module, kind, _ in replacements:
        _check_replaceable(module, kind)
    return Calibration(config, replacements)


def _adapter(model: nn.Module) -> ModuleType:
    """The modules for the package that the model is of, which is loaded then."""
    if isinstance(model, _loaded("transformers.models.sam3.modeling_sam3", "Sam3Model")):
        from . import huggingface

        return huggingface
    if isinstance(model, _loaded("sam3.model.sam3_image", "Sam3Image")):
        from . import meta

        return meta
    raise ValueError(
        "model must be a transformers Sam3Model or Meta's Sam3Image, got "
        f"{type(model).__name__}; of a compiled model, or transformers' video model, pass the one "
        "inside"
    )


def _loaded(module: str, kind: str) -> type | tuple[()]:
    return getattr(sys.modules.get(module), kind, ())


def _check_replaceable(module: nn.Module, kind: type) -> None:
    """ValueError where the module's own forward is not all that its calls run."""
    own = type(module) if kind is type(module) else kind.__base__
    if type(module) is not own:
        raise ValueError(f"the calibration needs SAM3's own {own.__name__}, got {type(module)}")
    forward = vars(module).get("forward")
    if forward is None or kind.forward is own.forward:
        return
    if getattr(forward, "__func__", None) is not own.forward:
        raise ValueError(
            f"the model's {own.__name__} has a forward that hides that of its class, as "
            "compile_mode and accelerate's hooks leave one: build the model without them, or "
            "remove them, and call its compile() instead"
        )


def _become(module: nn.Module, kind: type) -> None:
    """Change a module's class, with its `forward` if the instance holds only its class's own.

    transformers 5.0 leaves one behind when it has recorded outputs; it would outlive the class.
    """
    forward = vars(module).get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward
    module.__class__ = kind
