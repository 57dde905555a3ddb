"""The settings of `scclip-fast eval --compare`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from . import models
from .options import CommandError

if TYPE_CHECKING:  # of the extras
    from ..clip import SCCLIPConfig
    from ..sam3 import Sam3CalibrationConfig

Setting = TypeVar("Setting")

ABLATION = "ablation"
_STANDS_FOR = {  # the settings that "ablation" stands for, by the kind of model
    "CLIP": ["scclip", *(f"scclip/no-{s.replace('_', '-')}" for s in models.SWITCHES), "clip"],
    "SAM3": [
        *("none", "trunk_repair", "trunk_aggregate", "trunk_attention", "trunk_fusion", "default")
    ],
}
# Options that choose one setting.
_ONE = ("--method", *map(models.switch, models.SWITCHES), "--sam3-stages", "--sam3-preset")


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --compare."""
    parser.add_argument(
        "--compare",
        metavar="SETTINGS",
        help="settings that share one pass over the images, with commas between them, and the "
        "differences of the others from the first. Of a CLIP: methods, and scclip/no-STAGE, with "
        "more stages after more slashes. Of a SAM3: none, default, seed, and stages with + between "
        "them. ablation: the stages one by one",
    )


def names(args: argparse.Namespace) -> list[str]:
    """Returns the names of the settings of --compare; none without it.

    Raises:
        CommandError: a name is empty or repeated, or another option chooses one setting.
    """
    if args.compare is None:
        return []
    if chosen := [option for option in _ONE if option in args.only_for]:
        raise CommandError(f"--compare chooses the settings, and {chosen[0]} one: give one of both")
    kind = "SAM3" if models.is_sam3(args.model) else "CLIP"
    if args.batch is not None and kind == "CLIP":
        raise CommandError("--compare takes one image at a time, so that --batch has no use")
    given = [name.strip() for name in args.compare.split(",")]
    given = _STANDS_FOR[kind] if given == [ABLATION] else given
    if not all(given):
        raise CommandError(f"--compare has an empty setting, got {args.compare!r}")
    if repeated := sorted({name for name in given if given.count(name) > 1}):
        raise CommandError(f"--compare names {', '.join(repeated)} more than once")
    return given


def clip_settings(names: list[str], config: SCCLIPConfig) -> dict[str, tuple[str, SCCLIPConfig]]:
    """Returns the method and the configuration of each setting, or raises CommandError.

    Args:
        names: the names of the settings.
        config: the configuration for the model's depth.
    """
    stages = {f"no-{stage.replace('_', '-')}": stage for stage in models.SWITCHES}
    settings = {}
    for name in names:
        method, *off = name.split("/")
        if method not in models.METHODS:
            allowed = ", ".join(models.METHODS)
            raise CommandError(f"--compare: {method!r} is no method; choose from {allowed}")
        if off and method != "scclip":
            raise CommandError(f"--compare: only scclip has stages to leave out, got {name!r}")
        if unknown := [part for part in off if part not in stages]:
            allowed = ", ".join(stages)
            raise CommandError(f"--compare: {unknown[0]!r} is none of {allowed}")
        settings[name] = method, replace(config, **{stages[part]: False for part in off})
    return _distinct(settings)


def sam3_settings(
    names: list[str], layers: int, decoder_layers: int
) -> dict[str, Sam3CalibrationConfig | None]:
    """Returns the calibration of each setting, None for the frozen model, or raises CommandError.

    Args:
        names: the names of the settings.
        layers: the number of the trunk's layers.
        decoder_layers: that of the DETR decoder's.
    """
    from ..sam3.config import STAGES, Sam3CalibrationConfig

    preset = Sam3CalibrationConfig.for_depth(layers)
    whole = {"none": None, "default": preset, "seed": Sam3CalibrationConfig.seed()}
    settings = {}
    for name in names:
        if name in whole:
            settings[name] = whole[name]
        else:
            chosen = name.split("+")
            if unknown := [stage for stage in chosen if stage not in STAGES]:
                allowed = ", ".join((*whole, *STAGES))
                raise CommandError(f"--compare: {unknown[0]!r} is none of {allowed}")
            settings[name] = replace(preset, **{stage: stage in chosen for stage in STAGES})
        if settings[name] is not None:
            try:
                settings[name].check(layers, decoder_layers)
            except ValueError as error:
                raise CommandError(f"--compare: {name} does not fit: {error}") from None
    return _distinct(settings)


def _distinct(settings: dict[str, Setting]) -> dict[str, Setting]:
    """Returns the settings, or raises CommandError if two of them are the same."""
    by_setting: dict[Setting, str] = {}
    for name, setting in settings.items():
        if setting in by_setting:
            raise CommandError(f"--compare: {by_setting[setting]} and {name} are the same")
        by_setting[setting] = name
    return settings
