"""The HTML of a result, pictures included, for the page of `scclip-fast app`."""

from __future__ import annotations

import base64
import io
from html import escape

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from . import overlay
from .app_result import Result, Variant
from .lof_picture import draw_scores, outline

_SIDE = 720  # pixels of a large picture's longer side, at least
_SMALL_SIDE = 240  # of one among the variants, at most
_WITH_SCALE = 1.12  # width of the heat map with its scale, of that without
_GREY = "#808080"  # readable on light and on dark
_DPI = 150

STYLE = """
.sc { display: grid; gap: 1.75rem; }
.sc h3 { margin: 0 0 .5rem; font-size: 1rem; font-weight: 600; }
.sc p { margin: 0 0 .75rem; font-size: .875rem; }
.sc p, .sc-legend span, .sc-variants span {
  color: color-mix(in srgb, currentColor 65%, transparent); }
.sc img { display: block; width: 100%; margin: 0; border-radius: 6px; }
.sc-top { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.sc-top section { flex: 1 0 260px; }
.sc-top section + section { flex-grow: 1.12; flex-basis: 291px; }  /* as its scale is 0.12 wide */
.sc-top p { margin: .6rem 0 0; }
.sc-legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .6rem 0 0; padding: 0;
  list-style: none; font-size: .875rem; max-height: 9rem; overflow-y: auto; }
.sc-legend li { display: flex; align-items: center; gap: .4rem; margin: 0; }
.sc-legend i { width: .8rem; height: .8rem; border-radius: 3px; }
.sc-variants { display: grid; gap: 1rem .7rem;
  grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); }
.sc-variants figure { margin: 0; }
.sc-variants figcaption { margin-top: .4rem; font-size: .8125rem; line-height: 1.35; }
.sc-variants b, .sc-variants span { display: block; }
.sc-variants b { font-weight: 600; }
.sc-variants img + img { margin-top: .35rem; image-rendering: pixelated; }
.sc-error { padding: .9rem 1.1rem; border-radius: 6px; border-left: 4px solid #dc2626;
  background: #dc262618; }
"""


def message(text: str) -> str:
    """What went wrong."""
    return f'<div class="sc-error" role="alert">{escape(text)}</div>'


def page(result: Result) -> str:
    """The segmentation with its legend, the outliers, and all variants side by side."""
    return (
        f'<div class="sc"><div class="sc-top">{_segmentation(result)}{_outliers(result)}</div>'
        f"{_variants(result)}</div>"
    )


def _segmentation(result: Result) -> str:
    photo, labels = result.photo, result.variants[0].labels
    if (scale := _SIDE // max(photo.size)) > 1:  # the browser would blur the lines
        photo = photo.resize((photo.width * scale, photo.height * scale), Image.Resampling.BICUBIC)
        labels = labels.repeat(scale, axis=0).repeat(scale, axis=1)
    ranked = overlay.ranked(labels)
    entries = [
        f'<li><i style="background: rgb{tuple(overlay.palette()[index].tolist())}"></i>'
        f"{escape(result.names[index])} <span>{escape(overlay.percent(share))}</span></li>"
        for index, (share,) in ranked.items()
    ]
    found = "segmentation: " + ", ".join(result.names[index] for index in ranked)
    return (
        f"<section><h3>Segmentation</h3>{_img(overlay.blend(photo, labels), found)}"
        f'<ul class="sc-legend">{"".join(entries)}</ul></section>'
    )


def _outliers(result: Result) -> str:
    if result.scores is None:
        h, w = result.variants[0].colours.shape[:2]
        text = f"Of {h} × {w} patches, none has that many neighbours: none is taken for an outlier."
        return f"<section><h3>Local Outlier Factor</h3><p>{text}</p></section>"
    count, of = int(result.outliers.sum()), result.outliers.numel()
    text = f"{count:,} of {of:,} patches are outliers, outlined in cyan."
    picture = _img(heat_map(result.scores, result.outliers), f"Local Outlier Factor: {text}")
    return f"<section><h3>Local Outlier Factor</h3>{picture}<p>{text}</p></section>"


def heat_map(scores: Tensor, outliers: Tensor) -> Image.Image:
    """LOF scores (h, w), with the outliers, bool (h, w), outlined and a scale at the side."""
    h, w = scores.shape
    size = _SIDE / _DPI / max(h, w)
    figure = Figure(figsize=(_WITH_SCALE * w * size, h * size))
    axes = figure.add_axes((0, 0, 1 / _WITH_SCALE, 1), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    draw_scores(axes, scores)
    axes.add_collection(outline(outliers, "cyan"))
    (scale,) = axes.child_axes
    scale.tick_params(colors=_GREY, labelsize=8, length=2)
    file = io.BytesIO()
    figure.savefig(file, dpi=_DPI, transparent=True)
    return Image.open(file)


def _variants(result: Result) -> str:
    figures = "".join(_variant(result.photo, variant) for variant in result.variants)
    return (
        "<section><h3>What each stage changes</h3>"
        "<p>Above the classes, below the features (principal components as colours). "
        "Changed: pixels that get another class.</p>"
        f'<div class="sc-variants">{figures}</div></section>'
    )


def _variant(photo: Image.Image, variant: Variant) -> str:
    classes = overlay.blend(photo, variant.labels)
    classes.thumbnail((_SMALL_SIDE, _SMALL_SIDE), Image.Resampling.LANCZOS)
    features = Image.fromarray(variant.colours)
    first = variant.name == "SC-CLIP"
    share = "as set" if first else f"{overlay.percent(variant.changed)} changed"
    return (
        f"<figure>{_img(classes, f'{variant.name}: classes')}"
        f"{_img(features, f'{variant.name}: features')}"
        f"<figcaption><b>{variant.name}</b><span>{escape(share)}</span></figcaption></figure>"
    )


def _img(picture: Image.Image, alt: str) -> str:
    """A picture in the page itself: no file of it is left anywhere."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
