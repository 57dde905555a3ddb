"""The library that a model's name stands for, and transformers' CLIP by its name."""

import json
import time

import huggingface_hub.constants as hub
import pytest
import torch
from cli_runs import run, save_tiny, written
from copied_clip import copied, their_tokenizer
from PIL import Image
from tiny_clip import images, tiny_clip
from tiny_sam3 import save_tiny_sam3
from transformers import CLIPImageProcessor, CLIPProcessor

from scclip_fast.clip import SCCLIP, create_model, sources
from scclip_fast.clip.sources import HUB_TIMEOUT, HubError, Source, find_source


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder with a tiny CLIP of transformers and its processor, as after a download."""
    folder = tmp_path_factory.mktemp("clip")
    copied(tiny_clip(layers=4, quick_gelu=True)).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), their_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The empty cache of the hub, whose address does not answer."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    url = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    return tmp_path / "hub"


def store(cache, name, files):
    """Puts files into a repository of the cache; `files` maps names to contents."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file, content in files.items():
        (snapshot / file).write_bytes(content)


NAMES = {
    "scenes": sources.SCENES,
    "ViT-B-16-quickgelu": "ViT-B-16-quickgelu",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
    "hf-hub:someone/model": "hf-hub:someone/model",
    "local-dir:a/b/c": "local-dir:a/b/c",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items(), ids=NAMES)
def test_names_of_open_clip(cache, name, expected):
    source = find_source(name)
    assert source == Source("open_clip", expected)
    assert source.brings_weights == (":" in expected)


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("clip", "transformers"), ("sam3", "sam3"), ("sam3_video", "sam3")],  # facebook/sam3: video
)
def test_kinds_by_their_config(cache, tmp_path, place, model_type, kind):
    config = json.dumps({"model_type": model_type}).encode()
    name = "someone/model" if place == "hub" else str(tmp_path / "model")
    if place == "hub":
        store(cache, name, {"config.json": config})
    else:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_bytes(config)
    assert find_source(name) == Source(kind, name)
    assert find_source(name).brings_weights


def test_folders_of_open_clip(tmp_path):
    save_tiny(tmp_path)
    assert find_source(str(tmp_path)) == Source("open_clip", f"local-dir:{tmp_path}")
    assert create_model(str(tmp_path))[0].patch_size == 4


REFUSED = {
    "another": ('{"model_type": "bert"}', "holds bert; transformers' clip, sam3"),
    "typeless": ("{}", "holds a config.json without model_type"),
    "a list": ("[]", "cannot read the config.json"),
    "no JSON": ("no", "cannot read the config.json"),
    "none": (None, "holds no model: it has no config.json and no open_clip_config.json"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_folders_that_are_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        find_source(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "a/b/c", "~/model", "a/", "a /b"])
def test_paths_that_are_no_folders(cache, name):
    with pytest.raises(ValueError, match="there is no folder"):
        find_source(name)


@pytest.mark.parametrize("name", ["someone/model", "openai/clip-vit-base-patch16"])
def test_a_hub_out_of_reach(cache, name):
    start = time.perf_counter()
    with pytest.raises(HubError, match=f"^cannot reach {name} on the hub: .+") as error:
        create_model(name)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < HUB_TIMEOUT + 1


@pytest.mark.parametrize("file", ["config.json", "open_clip_config.json"])
def test_a_cached_config_without_its_weights(cache, file):
    """transformers and open_clip would retry the download for minutes without a check."""
    store(cache, "someone/model", {file: b'{"model_type": "clip"}'})
    start = time.perf_counter()
    name = "someone/model" if file == "config.json" else "hf-hub:someone/model"
    with pytest.raises(HubError, match="cannot reach someone/model on the hub"):
        create_model(name)
    assert time.perf_counter() - start < HUB_TIMEOUT + 3


def test_offline_mode(cache, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="cannot reach someone/model"):
        find_source("someone/model")


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_transformers_clip_by_its_name(theirs, cache, place):
    if place == "hub":
        files = {path.name: path.read_bytes() for path in theirs.iterdir() if path.is_file()}
        store(cache, "someone/clip", files)
    encoder, processor = create_model("someone/clip" if place == "hub" else str(theirs))
    expected = SCCLIP(copied(tiny_clip(layers=4, quick_gelu=True)))
    x = images(1, 32, 48)
    torch.testing.assert_close(encoder(x), expected(x))
    assert isinstance(processor, CLIPProcessor)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_precision_of_transformers_clip(theirs):
    assert create_model(str(theirs), precision="bf16")[0].tower.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, bf16 here"):
        create_model(str(theirs), precision="pure_fp16")


def test_a_sam3_is_no_clip(tmp_path):
    save_tiny_sam3(tmp_path)
    with pytest.raises(ValueError, match=r"is a SAM3, which scclip_fast\.sam3 calibrates"):
        create_model(str(tmp_path))
    for command in (["lof"], ["app"]):
        code, _, stderr = run(*command, "--model", tmp_path, "--device", "cpu")
        assert (code, stderr.count("\n")) == (2, 1)
        assert f"{tmp_path} is a SAM3, which `scclip-fast segment` and `eval` take" in stderr


def test_commands_take_transformers_clip(theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((60, 40), 50).save("photo.png")
    model = ("--model", theirs, "--device", "cpu")
    words = ("photo.png", "--classes", "sky, tree", "--short-side", 32, "--out", "out")
    assert run("segment", *words, *model)[0] == 0
    assert written(tmp_path / "out") == ["photo_labels.png", "photo_overlay.png"]
    assert run("lof", "photo.png", "--size", 32, *model)[0] == 0
    assert run("eval", "scenes", "--limit", 1, "--slide-crop", 0, *model)[0] == 0
    assert json.loads((tmp_path / "eval.json").read_text())["model"]["pretrained"] is None
