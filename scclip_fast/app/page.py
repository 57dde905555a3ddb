"""The page of `scclip-fast app`: controls, and a result that follows them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..cli import classes as class_lists
from ..cli.files import read_photo
from ..cli.options import CommandError, out_of_memory
from ..cli.segment_images import EXAMPLE
from ..clip import SCCLIPConfig
from ..clip.config import STAGES
from ..scenes.draw import scene
from . import pictures
from .explore import Explorer

MAX_PIXELS = 50_000_000  # of a photo: 150 MB decoded
_MOST_NAMES = 256  # with synonyms; other visitors wait while the prompts are encoded
_EXAMPLE_CLASSES = "wood, black ring, blue cross, grass, sand, water, brick, stone"
_SLIDERS = {  # of SCCLIPConfig: label, lowest, highest, step
    "outlier_n_neighbors": ("k · LOF neighbours", 1, 100, 1),
    "outlier_contamination": ("contamination", 0.01, 0.5, 0.01),
    "beta": ("β · aggregation", 0, 1, 0.01),
    "gamma": ("γ · content sharpness", 0, 20, 0.1),
    "alpha": ("α · content share", 0, 1, 0.01),
}
_HINT = "Drop a photo, type what may be in it, and press Segment."
_STAGES_TEXT = """### What each stage changes
First the classes, then the features (principal components as colours). Changed: pixels that get
another class."""

# Fonts of the system, so that the browser fetches none.
THEME = gr.themes.Default(
    primary_hue="blue",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Arial", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
)
# Gradio lays captions over the pictures and cuts them after a few letters.
STYLE = """
.gradio-container { max-width: 1400px !important; margin: auto; }
#variants .thumbnail-item { aspect-ratio: auto; height: auto; }
#variants .thumbnail-item .caption-label { position: static; max-width: none; white-space: normal; }
#variants .grid-container { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); }
"""


def build(explorer: Explorer, model: str, folder: Path) -> gr.Blocks:
    """Builds the page. With the model "scenes" the page starts with a drawn photo.

    Args:
        explorer: the model of the page.
        model: the name of the model.
        folder: the folder of uploaded photos.
    """
    config, scenes = explorer.config, model == "scenes"
    on = [stage for stage in STAGES if not (scenes and stage == "multi_level")]
    example = Image.fromarray(scene(*EXAMPLE).image) if scenes else None
    shown = dict(format="png", buttons=["fullscreen"])
    with gr.Blocks(title="scclip_fast", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(_heading(model))
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                photo = gr.Image(
                    example,
                    label="Photo",
                    format="png",
                    sources=["upload"],
                    height=240,
                    buttons=[],
                )
                # A path, which `respond` opens with limits: Gradio itself would decode any file.
                photo.preprocess = lambda data: None if data is None else data.path
                classes = gr.Textbox(
                    _EXAMPLE_CLASSES if scenes else "",
                    label="Classes, with commas between them",
                    placeholder="sky, tree, person|man|woman",
                    lines=2,
                    elem_id="classes",
                )
                button = gr.Button("Segment", variant="primary")
                sliders = [
                    gr.Slider(
                        low, high, getattr(config, name), step=step, label=label, elem_id=name
                    )
                    for name, (label, low, high, step) in _SLIDERS.items()
                ]
                stages = gr.CheckboxGroup(
                    [(stage.replace("_", " "), stage) for stage in STAGES],
                    value=on,
                    label="Stages",
                )
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    segmentation = gr.Image(
                        label="Segmentation: each pixel in the colour of its class, by SC-CLIP",
                        alt_text="segmentation",
                        interactive=False,
                        elem_id="segmentation",
                        **shown,
                    )
                    with gr.Column():
                        scores = gr.Plot(
                            label="Local Outlier Factor: bright patches have no near neighbours",
                            format="png",
                            elem_id="scores",
                        )
                        outliers = gr.Markdown("" if scenes else _HINT, elem_id="outliers")
                gr.Markdown(_STAGES_TEXT)
                variants = gr.Gallery(
                    label="Variants",
                    show_label=False,
                    columns=2 + len(STAGES),
                    height="max-content",
                    elem_id="variants",
                    **shown,
                )
        triggers = [
            button.click,
            classes.submit,
            stages.input,
            *(slider.change for slider in sliders),
        ]
        gr.on(
            [*triggers, page.load] if scenes else triggers,
            responder(explorer, folder),
            [photo, classes, stages, *sliders],
            [segmentation, scores, outliers, variants],
            api_name=False,
            concurrency_limit=1,
            trigger_mode="always_last",
            show_progress="minimal",
        )
    return page


def _heading(model: str) -> str:
    about = f"SC-CLIP repairs the dense features of a frozen CLIP, without training. Here: {model}"
    if model == "scenes":
        about += (
            ", a small model that was trained on drawn scenes only and does better without multi "
            "level"
        )
    return f"# scclip_fast\n{about}."


def responder(explorer: Explorer, folder: Path) -> Callable[..., tuple[Any, ...]]:
    """Returns the function that the page calls with a photo and the state of the controls.

    The function takes the path of a photo in `folder`, the list of classes, the stages that are on
    and the values of the sliders. It returns the segmentation, the heat map of the scores, a
    sentence on the outliers, and the pictures of the variants with their captions.
    """

    def respond(photo: str | None, classes: str, stages: list[str], *values: float) -> tuple:
        try:
            if photo is None:
                raise CommandError("Drop a photo first.")
            entries = _classes(classes)
            picture = _picture(Path(photo), folder)
            result = explorer.explore(picture, entries, _config(explorer, stages, values))
            return pictures.classes(result), *pictures.outliers(result), pictures.variants(result)
        except (CommandError, ValueError) as error:
            raise _shown(str(error)) from None
        except Exception as error:
            if isinstance(error, MemoryError) or out_of_memory(error):
                raise _shown("Out of memory; try a smaller photo or fewer classes.") from None
            traceback.print_exc(file=sys.stderr)
            raise _shown("Something went wrong; the terminal has the details.") from None

    return respond


def _shown(message: str) -> gr.Error:
    """Returns an error that the page shows; Gradio takes its message for HTML."""
    return gr.Error(escape(message), print_exception=False)


def _classes(text: str) -> list[str]:
    if not (entries := class_lists.split(text)):
        raise CommandError("Type at least one class, such as: sky, tree, person|man|woman")
    if (count := sum(map(len, entries))) > _MOST_NAMES:
        raise CommandError(f"{count} names are too many here; at most {_MOST_NAMES} are taken")
    return class_lists.checked(entries, "The list of classes")


def _picture(path: Path, folder: Path) -> Image.Image:
    # Gradio passes on any path that a forged request names.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CommandError(f"{path.name} is not a photo that came through this page")
    try:
        return read_photo(path, MAX_PIXELS)
    except CommandError as error:
        raise CommandError(str(error).replace(str(path), path.name)) from None


def _config(explorer: Explorer, stages: list[str], values: tuple[float, ...]) -> SCCLIPConfig:
    settings = dict(zip(_SLIDERS, values, strict=True))
    settings |= {stage: stage in stages for stage in STAGES}
    settings["outlier_n_neighbors"] = int(settings["outlier_n_neighbors"])
    return replace(explorer.config, **settings)
