"""`scclip-fast segment` with a SAM3: a small one with random weights, and none at all."""

import json
import string
from argparse import Namespace

import numpy as np
import pytest
import torch
import transformers
from cli_runs import run, written
from PIL import Image
from tiny_sam3 import SIDE, tiny_sam3
from transformers import CLIPTokenizer, Sam3Model, Sam3Processor

from scclip_fast.cli.segment_sam3 import Sam3Segmenter, load
from scclip_fast.sam3 import calibrate

SIZE = (40, 60)
# transformers 5.0 has it under its older name.
Sam3ImageProcessor = getattr(
    transformers, "Sam3ImageProcessor", getattr(transformers, "Sam3ImageProcessorFast", None)
)


def tiny_processor():
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    images = Sam3ImageProcessor(size={"height": SIDE, "width": SIDE})
    return Sam3Processor(images, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sam3")
    tiny_sam3().save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_files_of_an_image(folder, photo, tmp_path):
    out = tmp_path / "out"
    words = ("--classes", "sky, tree|bush", "--json", "--out", out, "--device", "cpu")
    code, _, stderr = run("segment", photo, "--model", folder, *words)
    assert code == 0, stderr
    assert written(out) == ["photo.json", "photo_labels.png", "photo_overlay.png"]
    report = json.loads((out / "photo.json").read_text())
    assert [c["name"] for c in report["classes"]] == ["background", "sky", "tree"]
    assert sum(c["share"] for c in report["classes"]) == pytest.approx(1)
    assert Image.open(out / "photo_labels.png").size == SIZE[::-1]


def test_instances_become_classes(photo, monkeypatch):
    """The best instance of a class's names, the best class of a pixel, or the background."""
    model, processor = tiny_sam3(), tiny_processor()
    top, left = torch.zeros(2, *SIZE, dtype=torch.bool)
    top[:20], left[:, :30] = True, True
    found = iter(
        [
            dict(scores=torch.tensor([0.4, 0.6]), masks=torch.stack([top, top & left])),  # sky
            dict(scores=torch.tensor([]), masks=torch.zeros(0, *SIZE)),  # tree
            dict(scores=torch.tensor([0.55]), masks=left[None]),  # bush
        ]
    )
    monkeypatch.setattr(
        Sam3Processor, "post_process_instance_segmentation", lambda *_, **__: [next(found)]
    )
    with calibrate(model):
        segmenter = Sam3Segmenter(model, processor, ["sky", "tree, bush"])
        [(labels, probabilities)] = segmenter.bands(Image.open(photo))
    assert segmenter.classes == ["background", "sky", "tree"]
    corners = [labels[0, 0], labels[0, -1], labels[-1, 0], labels[-1, -1]]
    assert [int(label) for label in corners] == [1, 0, 2, 0]
    assert torch.allclose(probabilities[:, 0, 0], torch.tensor([0.4, 0.6, 0.55]))


def test_the_model_is_calibrated_and_sees_every_prompt(folder, photo, monkeypatch):
    segmenter = load(Namespace(model=str(folder), device="cpu", precision="fp32"), ["sky", "a, b"])
    assert isinstance(segmenter.model, Sam3Model) and type(segmenter.model) is not Sam3Model
    trunk, prompts = [], []
    segmenter.model.vision_encoder.register_forward_hook(lambda *_: trunk.append(1))
    segmenter.model.text_encoder.register_forward_hook(lambda *_: prompts.append(1))
    list(segmenter.bands(Image.open(photo)))
    assert (len(trunk), len(prompts)) == (1, 3)


def test_weights_out_of_reach(photo, tmp_path):
    words = ("--classes", "sky", "--out", tmp_path / "out", "--device", "cpu")
    code, _, stderr = run("segment", photo, "--model", tmp_path / "nothing", *words)
    assert code != 0
    assert "cannot load" in stderr and "accept its license" in stderr and "scenes" in stderr


@pytest.mark.parametrize("option", [("--no-repair",), ("--method", "clip")])
def test_options_of_clip(option, folder, photo, tmp_path):
    words = ("--classes", "sky", "--out", tmp_path / "out", "--device", "cpu")
    code, _, stderr = run("segment", photo, "--model", folder, *words, *option)
    assert code != 0 and f"{option[0]} is for CLIP" in stderr
    assert not (tmp_path / "out").exists()
