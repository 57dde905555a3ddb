"""The page of `scclip-fast app`: controls, and a result that follows them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gradio as gr
from PIL import Image

from ..clip import SCCLIPConfig
from ..scenes.draw import scene
from . import app_html
from . import classes as class_lists
from .app_result import Explorer
from .files import read_photo
from .models import SWITCHES
from .options import CommandError, out_of_memory
from .segment_images import EXAMPLE

MAX_PIXELS = 50_000_000  # of a photo: 150 MB decoded
_MOST_NAMES = 256  # synonyms included: others wait while their prompts are encoded
_EXAMPLE_CLASSES = "brick, sand, red circle, purple star, grass, water, wood, stone"
_SLIDERS = {  # of SCCLIPConfig: label, lowest, highest, step
    "outlier_n_neighbors": ("k · LOF neighbours", 1, 100, 1),
    "outlier_contamination": ("contamination", 0.01, 0.5, 0.01),
    "beta": ("β · aggregation", 0, 1, 0.01),
    "gamma": ("γ · content sharpness", 0, 20, 0.1),
    "alpha": ("α · content share", 0, 1, 0.01),
}
# The system's, which nothing has to fetch.
_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Arial", "sans-serif"]
_MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
_HINT = "Drop a photo, type what may be in it, and press Segment."
_STYLE = """
.gradio-container { max-width: 1400px !important; margin: auto; }
.sc-title h1 { font-size: 1.4rem; margin: 0; }
.sc-title p { margin: 0; opacity: 0.65; }
"""


def serve(explorer: Explorer, args: argparse.Namespace) -> None:
    """Serve the page until Ctrl+C; photos are kept in a temporary folder that ends with it.

    Raises:
        CommandError: nothing can listen at --host and --port.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # or the folder would stay
    for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own page whether it is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", args.host]))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(explorer, args.model, Path(folder))
        try:
            page.launch(
                server_name=args.host,
                server_port=args.port,
                max_file_size=args.max_upload * 2**20,
                share=False,
                inbrowser=False,
                run_history=False,
                footer_links=[],
                prevent_thread_lock=True,
                quiet=True,
                theme=gr.themes.Default(primary_hue="blue", font=_FONT, font_mono=_MONO),
                css=_STYLE + app_html.STYLE,
            )
        except OSError:  # whose message is about Gradio's own settings
            raise CommandError(
                f"cannot listen at {args.host}:{args.port}: in use by another, or no address of "
                "this machine; choose another --port or --host"
            ) from None
        print(f"{page.local_url}  (Ctrl+C ends it)", flush=True)
        page.block_thread()


def build(explorer: Explorer, model: str, folder: Path) -> gr.Blocks:
    """The page, whose photos are in `folder`; with --model scenes it starts with a drawn one."""
    config, scenes = explorer.config, model == "scenes"
    on = [stage for stage in SWITCHES if not (scenes and stage == "multi_level")]
    example = Image.fromarray(scene(*EXAMPLE).image) if scenes else None
    with gr.Blocks(title="scclip_fast", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(_heading(model), elem_classes="sc-title")
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
                # A path, which `respond` opens with limits: Gradio itself would decode anything.
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
                    [(stage.replace("_", " "), stage) for stage in SWITCHES],
                    value=on,
                    label="Stages",
                )
            with gr.Column(scale=3, min_width=320):
                result = gr.HTML("" if scenes else _HINT, elem_id="result")
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
            result,
            api_name=False,
            concurrency_limit=1,
            trigger_mode="always_last",
            show_progress="minimal",
        )
    return page


def _heading(model: str) -> str:
    about = f"SC-CLIP repairs the dense features of a frozen CLIP, without training. Here: {model}"
    if model == "scenes":
        about += ", a small one that knows drawn scenes only and does better without multi level"
    return f"# scclip_fast\n{about}."


def responder(explorer: Explorer, folder: Path) -> Callable[..., str]:
    """What the page calls: a photo's path, in `folder`, and the state of the controls to HTML."""

    def respond(photo: str | None, classes: str, stages: list[str], *values: float) -> str:
        try:
            if photo is None:
                raise CommandError("Drop a photo first.")
            entries = _classes(classes)
            picture = _picture(Path(photo), folder)
            result = explorer.explore(picture, entries, _config(explorer, stages, values))
            return app_html.page(result)
        except (CommandError, ValueError) as error:
            return app_html.message(str(error))
        except Exception as error:
            if isinstance(error, MemoryError) or out_of_memory(error):
                return app_html.message("Out of memory; try a smaller photo or fewer classes.")
            traceback.print_exc(file=sys.stderr)
            return app_html.message("Something went wrong; the terminal says what.")

    return respond


def _classes(text: str) -> list[str]:
    if not (entries := class_lists.split(text)):
        raise CommandError("Type at least one class, such as: sky, tree, person|man|woman")
    if (count := sum(map(len, entries))) > _MOST_NAMES:
        raise CommandError(f"{count} names are too many here; at most {_MOST_NAMES} are taken")
    return class_lists.checked(entries, "The list of classes")


def _picture(path: Path, folder: Path) -> Image.Image:
    # Gradio passes on a path that a forged request names.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CommandError(f"{path.name} is none of the photos that came through this page")
    try:
        return read_photo(path, MAX_PIXELS)
    except CommandError as error:
        raise CommandError(str(error).replace(str(path), path.name)) from None


def _config(explorer: Explorer, stages: list[str], values: tuple[float, ...]) -> SCCLIPConfig:
    settings = dict(zip(_SLIDERS, values, strict=True))
    settings |= {stage: stage in stages for stage in SWITCHES}
    settings["outlier_n_neighbors"] = int(settings["outlier_n_neighbors"])
    return replace(explorer.config, **settings)
