"""Helpers that run `scclip-fast` in this process, on a tiny CLIP with random weights."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from scclip_fast import cli


def save_tiny(folder: Path, **changed: int) -> str:
    """Writes a tiny CLIP, the same at every call, and returns its --model.

    `changed` are settings of the vision tower.
    """
    text = dict(context_length=16, vocab_size=49408, width=16, heads=1, layers=1)
    vision = dict(image_size=32, patch_size=4, layers=3, width=32, head_width=16) | changed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(16, vision, text)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    settings = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return f"local-dir:{folder}"


def run(*words) -> tuple[int, str, str]:
    """Runs `scclip-fast WORDS`; returns exit code, stdout and stderr."""
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as exit:  # argparse raises it
            code = exit.code
    return code, stdout.getvalue(), stderr.getvalue()


def segment(*words, model: str, classes: str | None) -> tuple[int, str, str]:
    """Runs `scclip-fast segment WORDS` with a short side of 32 pixels."""
    named = [] if classes is None else ["--classes", classes]
    options = ["--model", model, "--device", "cpu", "--short-side", "32", *named]
    return run("segment", *options, *words)


def written(folder: Path) -> list[str]:
    """Returns the names of the files in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())
