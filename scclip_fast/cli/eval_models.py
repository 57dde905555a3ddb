"""The models of `scclip-fast eval`: segmenters, and the settings that results depend on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from . import comparisons, models, segment_sam3
from .options import CommandError

if TYPE_CHECKING:  # of the extras
    from ..evaluate import Protocol

Settings = dict[str, Any]


def load(args: argparse.Namespace) -> ClipModel | Sam3Model:
    """Loads the model of --model, or raises CommandError."""
    names = comparisons.names(args)
    return (Sam3Model if models.is_sam3(args.model) else ClipModel)(args, names)


class ClipModel:
    """A CLIP with the method of --method, or those of --compare.

    Args:
        args: the options.
        names: the settings to compare; none for one evaluation.
    """

    def __init__(self, args: argparse.Namespace, names: list[str]) -> None:
        from ..clip.shared_layers import SharedLayers
        from ..evaluate import provenance

        if proxied := [name for name in names if name in models.PROXY_METHODS]:
            args.method = proxied[0]
        self.args = args
        self.encoder, self.tokenizer = models.load_encoder(args)
        self.digest = provenance.weights_digest(self.encoder)
        self.compared = comparisons.clip_settings(names, self.encoder.config)
        if self.compared:
            encoder = self.encoder
            parts = (encoder.model, encoder.config, encoder.method, encoder.proxy)
            self.encoder = SharedLayers(*parts)

    def settings(self, protocol: Protocol) -> Settings:
        """Returns the settings of an evaluation; "protocol" has the arguments of the segmenter."""
        args = self.args
        method = dict(method=args.method, proxy=args.proxy)
        settings = {
            "pixels": "resized in uint8 as by OpenCV, also as the picture that PAMR follows",
            "protocol": {
                **protocol.thresholds(),
                "slide_crop": args.slide_crop or None,
                "slide_stride": args.slide_stride,
                "stitch": args.stitch,
                "pamr_steps": args.pamr_steps,
            },
            "model": {
                "name": args.model,
                "pretrained": None if models.brings_weights(args.model) else args.pretrained,
                **(dict(proxy=args.proxy) if self.compared else method),
                "precision": args.precision,
                "weights": self.digest,
            },
        }
        if self.compared:
            compared = {n: {"method": m} | asdict(c) for n, (m, c) in self.compared.items()}
            return settings | {"compare": compared}
        config = asdict(self.encoder.config) if args.method == "scclip" else {}
        return settings | {"config": config}

    def segmenter(self, protocol: Protocol, settings: Settings) -> Callable:
        """Returns the segmenter of a data set, or a `Comparison`; ValueError for bad prompts."""
        from ..evaluate import PublishedSegmenter, compare_clip

        prompts, rules = protocol.class_names(), settings["protocol"]
        segmenter = PublishedSegmenter(
            self.encoder, self.tokenizer, prompts, shared_names=True, **rules
        )
        return compare_clip(segmenter, self.compared) if self.compared else segmenter


class Sam3Model:
    """A SAM3 with the calibration of --sam3-stages, or those of --compare.

    Args:
        args: the options.
        names: the settings to compare; none for one evaluation.
    """

    def __init__(self, args: argparse.Namespace, names: list[str]) -> None:
        from ..evaluate import provenance

        args.extra = f"{args.extra},sam3"
        self.args = args
        self.model, self.processor = models.load_sam3(args)
        self.digest = provenance.weights_digest(self.model)
        layers = len(self.model.vision_encoder.backbone.layers)
        self.compared = comparisons.sam3_settings(
            names, layers, len(self.model.detr_decoder.layers)
        )
        self.config = None if names else segment_sam3.calibration(args, self.model)

    def settings(self, protocol: Protocol) -> Settings:
        """Returns the settings of an evaluation."""
        args, has_background = self.args, protocol.background is not None
        about = dict(name=args.model, precision=args.precision, weights=self.digest)
        settings = {
            # The published thresholds are for a CLIP's softmax.
            "protocol": {
                "background": protocol.background,
                "prob_thd": segment_sam3.prob_thd(args) if has_background else 0.0,
                "margin_thd": args.margin_thd if has_background else 0.0,
            },
            "model": about | {"heads": args.heads, "preview": args.preview},
        }
        if self.compared:
            compared = {n: c and c.to_dict() for n, c in self.compared.items()}
            return settings | {"compare": compared}
        return settings | {"config": self.config.to_dict()}

    def segmenter(self, protocol: Protocol, settings: Settings) -> Callable:
        """Returns the segmenter of a data set, or a `Comparison`; ValueError for bad prompts."""
        from ..evaluate import Sam3Labels, SharedTrunk, compare_sam3
        from ..segment import Sam3Segmenter

        kind = SharedTrunk if self.compared else Sam3Segmenter
        options = segment_sam3.segmenter_options(self.args)
        make = partial(kind, self.model, self.processor, config=self.config, **options)
        labels = Sam3Labels(make, protocol.class_names(), **settings["protocol"])
        return compare_sam3(labels, self.compared) if self.compared else labels


def check(args: argparse.Namespace, protocols: list[Protocol]) -> None:
    """Raises CommandError for options that do not fit the model, the data sets or each other."""
    models.check_kind(args)
    comparisons.names(args)
    if not models.is_sam3(args.model):
        return
    segment_sam3.stages(args.sam3_stages)
    if all(protocol.background is None for protocol in protocols):
        for option, value in (("--prob-thd", args.prob_thd), ("--margin-thd", args.margin_thd)):
            if value:
                dataset = protocols[0].name
                raise CommandError(f"{option} is for data sets with a background, not {dataset}")
