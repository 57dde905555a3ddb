"""Errors of `scclip-fast segment` with a SAM3, and with options of the other kind of model."""

import re
import sys
import time
from shutil import copytree

import pytest
import torch
from cli_runs import run, written
from huggingface_hub import constants as hub
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_sam3 import save_tiny_sam3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_sam3(tmp_path_factory.mktemp("sam3"))


@pytest.fixture
def photo(tmp_path):
    Image.effect_noise((60, 40), 50).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def command(folder, photo, tmp_path):
    """Runs `scclip-fast segment` on the photo, with results in the folder out."""

    def command(*words, model=folder):
        words = ("--model", model, "--classes", "sky", "--device", "cpu", *words)
        return run("segment", photo, "--out", tmp_path / "out", *words)

    return command


def test_weights_out_of_reach(command, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    url = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    start = time.perf_counter()
    code, _, stderr = command(model="facebook/sam3")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "cannot reach facebook/sam3 on the hub: " in stderr and "scenes" in stderr
    assert time.perf_counter() - start < 3  # transformers would try for minutes


OF_CLIP = [  # some values are the defaults, which are refused too
    ("--pretrained", "openai"),
    ("--method", "scclip"),
    ("--no-repair",),
    ("--short-side", "336"),
    ("--slide-crop", "0"),
    ("--slide-stride", "112"),
    ("--stitch",),
    ("--logit-scale", "40"),
    ("--area-thd", "0.1"),
    ("--background", "sky"),
    ("--pamr-steps", "0"),
]
OF_SAM3 = [
    ("--sam3-stages", "none"),
    ("--sam3-preset", "depth"),
    ("--heads", "both"),
    ("--preview", "0.5"),
    ("--prompts-per-pass", "4"),
    ("--margin-thd", "0"),
]


@pytest.mark.parametrize("option", OF_CLIP + OF_SAM3, ids=lambda option: option[0])
def test_options_of_the_other_model(option, command, folder, tmp_path):
    model, kind = (folder, "CLIP") if option in OF_CLIP else ("scenes", "SAM3")
    code, _, stderr = command(*option, model=model)
    message = f"scclip-fast segment: error: {option[0]} is for {kind}, not for {model}\n"
    assert (code, stderr) == (2, message)
    assert not (tmp_path / "out").exists()


def test_every_option_is_looked_at(command):
    assert "--method is for CLIP" in command("--method", "clip", "--sam3-stages", "none")[2]


WRONG = {
    "2000": ("--classes", ",".join(map(str, range(2000))), "has 2000 classes; at most 1203"),
    "background": ("--classes", "tree, background", "names the background"),
    "case": ("--classes", "Brick, brick", "not by case alone, got Brick, brick more than once"),
    "a shared synonym": ("--classes", "person|man, worker|man", "got man more than once"),
    "long": ("--classes", " ".join("x" * 100), "is too long a prompt: 102 tokens of 32"),
    "stage": ("--sam3-stages", "trunk_repair,magic", "some of trunk_repair, .*; got 'magic'"),
    "empty": ("--sam3-stages", "", "got ''"),
    "none of them": ("--sam3-stages", "none,trunk_repair", "got 'none'"),
    "heads": ("--heads", "mask", "argument --heads: invalid choice: 'mask'"),
    "no preview": ("--preview", "0", "--preview: must be above 0 and at most 1, got '0'"),
    "preview": ("--preview", "much", "--preview: must be above 0 and at most 1, got 'much'"),
    "prompts": ("--prompts-per-pass", "0", "must be a whole number above 0, got '0'"),
    "device": ("--device", "tpu", "--device must be cpu, cuda or cuda:INDEX, got 'tpu'"),
    "precision": ("--precision", "fp8", "argument --precision: invalid choice: 'fp8'"),
    "preset": ("--sam3-preset", "magic", "invalid choice: 'magic'"),
    "depth": ("--sam3-preset", "seed", r"seed does not fit: .* trunk of 6 layers .*, got 6"),
}


@pytest.mark.parametrize(("option", "value", "message"), WRONG.values(), ids=WRONG)
def test_wrong_choices(command, option, value, message):
    code, _, stderr = command(option, value)
    assert code == 2 and re.search(f"^scclip-fast segment: error: .*{message}", stderr, re.M)


def test_damaged_weights(folder, command, tmp_path):
    damaged = copytree(folder, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    code, _, stderr = command(model=damaged)
    assert code == 2 and f"error: cannot load {damaged}: " in stderr


def test_weights_that_are_not_finite(folder, command, tmp_path):
    """NaN scores are below every threshold, so every pixel would become background."""
    broken = copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("patch_embeddings.projection.weight"))
    weights[name][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, stderr = command(model=broken)
    assert code == 2 and "error: the model's logits and masks are not finite" in stderr
    assert written(tmp_path / "out") == []


def test_missing_extra(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    stderr = command()[2]
    assert 'needs the package transformers: pip install "scclip_fast[demo,sam3]"' in stderr
