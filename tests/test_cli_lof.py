"""`scclip-fast lof`, run in this process on a tiny CLIP; the model hub is never reached."""

import json
import re
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants as hub
from PIL import Image
from safetensors.torch import save_file

import scclip_fast
from scclip_fast import cli
from scclip_fast.cli import lof_photo, models
from scclip_fast.clip import create_model, loading
from scclip_fast.clip.sources import HUB_TIMEOUT

MODEL, TAG, SIZES = "tiny", "some_tag", (112, 128)
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 96, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1},
}
ROW = re.compile(r"(?P<size>\d+) +(?P<tokens>\d+) +(?P<outliers>\d+)")


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Adds the tiny model to open_clip's, empties the hub cache, and makes the hub unreachable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, MODEL, CONFIG)
        weights = {TAG: open_clip.pretrained._pcfg(hf_hub="someone/tiny/")}
        patch.setitem(open_clip.pretrained._PRETRAINED, MODEL, weights)
        patch.setattr(hub, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        url = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        yield


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    y, x = np.mgrid[:150, :200]
    noise = np.random.default_rng(0).integers(0, 60, (150, 200))
    pixels = np.stack([x, y, 40 * (x // 50) + noise], axis=2).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    path.with_name("damaged.png").write_bytes(path.read_bytes()[:2000])
    return path


@pytest.fixture(scope="module")
def run(offline, photo):
    """Runs `scclip-fast lof` on the tiny model; returns exit code, stdout and stderr."""
    folder = photo.parent

    def run(*words, photo=photo.name, size=SIZES[:1], out=folder / "lof.png", **named):
        named = {"model": MODEL, "pretrained": "random", "device": "cpu", "out": out, **named}
        argv = ["lof", folder / photo, *words]
        argv += [word for k, v in named.items() for word in (f"--{k}", v)]
        with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
            try:
                code = cli.main([str(word) for word in [*argv, "--size", *size]])
            except SystemExit as exit:  # of argparse
                code = exit.code
        return code, stdout.getvalue(), stderr.getvalue()

    return run


@pytest.fixture(scope="module")
def demo(run, photo):
    """Returns stdout and the path of the picture of a run over all sizes."""
    picture = photo.with_name("picture")
    code, stdout, stderr = run(size=SIZES, out=picture, json=picture.with_suffix(".json"))
    assert (code, stderr) == (0, "")
    return stdout, picture


def rows(stdout):
    return [match.groupdict() for line in stdout.splitlines() if (match := ROW.fullmatch(line))]


def random_model():
    """Returns the model of `--pretrained random`."""
    args = cli._parser().parse_args(["lof", "--model", MODEL, "--pretrained", "random"])
    return models.load_encoder(args)[0]


def tokens_of(photo, size):
    with Image.open(photo) as image:
        pixels = open_clip.image_transform(size, is_train=False)(image)
    return lof_photo.patch_tokens(random_model(), pixels)


def test_report(demo, photo):
    stdout, _ = demo
    assert [int(row["size"]) for row in rows(stdout)] == list(SIZES)
    for row in rows(stdout):
        tokens = tokens_of(photo, int(row["size"]))
        indices, _ = scclip_fast.lof(tokens)
        assert int(row["tokens"]) == len(tokens) == (int(row["size"]) // 16) ** 2
        assert int(row["outliers"]) == len(indices) > 0


def test_random_weights_are_announced(demo):
    stdout, _ = demo
    assert re.search(r"^weights +random \(seed 0\)$", stdout, re.MULTILINE)


def test_no_random_weights_unless_asked(run, tmp_path):
    """Weights out of reach are an error within seconds, as in the other commands."""
    start = time.perf_counter()
    code, stdout, stderr = run(pretrained=TAG, out=tmp_path / "lof.png")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert f"cannot download {MODEL} {TAG}: cannot reach someone/tiny on the hub" in stderr
    assert time.perf_counter() - start < HUB_TIMEOUT + 3
    assert not (tmp_path / "lof.png").exists()


def test_scenes(run, tmp_path):
    out = tmp_path / "new" / "lof.jpg"
    code, stdout, _ = run(model="scenes", precision="bf16", out=out)
    assert code == 0 and re.search(r"^weights +those of the model$", stdout, re.MULTILINE)
    with Image.open(tmp_path / "new" / "lof.jpg") as image:
        assert image.format == "JPEG"


def test_data(demo, photo):
    _, picture = demo
    report = json.loads(picture.with_suffix(".json").read_text())
    assert report["settings"]["neighbors"] == 30
    for entry, size in zip(report["sizes"], SIZES, strict=True):
        assert entry.keys() == {"size", "grid", "scores", "outliers"}
        side = size // 16
        indices, scores = scclip_fast.lof(tokens_of(photo, size))
        assert (entry["size"], entry["grid"]) == (size, [side, side])
        np.testing.assert_allclose(entry["scores"], scores.unflatten(0, (side, side)), rtol=1e-5)
        rows, columns = (entry["outliers"][i] for i in (0, -1))
        assert [rows, columns] == [[int(i) // side, int(i) % side] for i in indices[[0, -1]]]


def test_arrays(run, photo, tmp_path):
    assert run("--force", size=SIZES, npy=tmp_path / "x.npy")[0] == 0
    assert run("--force", npy=tmp_path / "x.npy")[0] == 0
    arrays = [np.load(tmp_path / f"x{size}.npy") for size in ("_112", "_128", "")]
    assert [array.shape for array in arrays] == [(7, 7), (8, 8), (7, 7)]
    expected = scclip_fast.lof_scores(tokens_of(photo, 112)).unflatten(0, (7, 7))
    np.testing.assert_allclose(arrays[2], expected, rtol=1e-5)


@pytest.mark.parametrize("option", ["out", "json", "npy"])
def test_nothing_is_overwritten(run, tmp_path, option):
    suffix = {"out": ".png", "json": ".json", "npy": ".npy"}[option]
    path = tmp_path / f"mine{suffix}"
    path.write_text("mine")
    named = {"out": tmp_path / "lof.png", option: path}
    code, _, stderr = run(**named)
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"{path} is there; --force replaces it" in stderr and path.read_text() == "mine"
    assert run("--force", **named)[0] == 0
    assert path.read_bytes() != b"mine"


def test_two_results_in_one_file(run, tmp_path):
    code, _, stderr = run(out=tmp_path / "x", json=tmp_path / "." / "x")
    assert (code, stderr.count("\n")) == (2, 1) and "must name different files" in stderr


def test_weights_that_are_not_finite(run, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        encoder, tokenizer = create_model(*args, **kwargs)
        encoder.model.visual.class_embedding[0] = torch.nan
        return encoder, tokenizer

    monkeypatch.setattr("scclip_fast.clip.create_model", broken, raising=False)
    code, _, stderr = run(out=tmp_path / "lof.png")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "the model's patch tokens are not finite" in stderr
    assert not (tmp_path / "lof.png").exists()


def test_picture(demo):
    _, path = demo
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    assert 800 < pixels.shape[0] < 1000 < pixels.shape[1]
    panels = [panel for row in np.array_split(pixels, 2) for panel in np.array_split(row, 4, 1)]
    assert all((panel < 250).any(axis=2).mean() > 0.5 for panel in panels)  # not white


def test_options_reach_lof(run, photo):
    _, stdout, _ = run("--force", neighbors=7, contamination=0.2)
    indices, _ = scclip_fast.lof(tokens_of(photo, SIZES[0]), 7, 0.2)
    assert [int(row["outliers"]) for row in rows(stdout)] == [len(indices)]


def test_photos_are_upright_rgb(tmp_path):
    assert lof_photo.load_photo(None).size == (640, 427)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new("L", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    photo = lof_photo.load_photo(tmp_path / "turned.jpg")
    assert (photo.size, photo.mode) == ((20, 30), "RGB")


def test_tokens_are_those_before_the_last_block(offline):
    encoder = random_model()
    visual = encoder.model.visual
    pixels = torch.rand(3, *visual.image_size, generator=torch.Generator().manual_seed(0))
    tokens = lof_photo.patch_tokens(encoder, pixels)
    expected = visual.forward_intermediates(
        pixels[None], indices=[1], output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(tokens, expected["image_intermediates"][0][0], rtol=1e-4, atol=1e-5)


def test_random_weights_are_the_same_at_every_call(offline):
    first = random_model().state_dict()
    state = torch.manual_seed(1).get_state()
    second = random_model().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_no_retries_without_a_hub(offline):
    start = time.perf_counter()
    reason = loading.fetch_weights(MODEL, TAG)
    assert reason and "\n" not in reason
    assert time.perf_counter() - start < HUB_TIMEOUT + 3


def test_weights_from_the_cache(run, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    torch.manual_seed(1)
    weights = open_clip.create_model(MODEL).state_dict()
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(weights, snapshot / "open_clip_model.safetensors")
    code, stdout, _ = run("--force", pretrained=TAG)
    assert code == 0
    assert re.search(rf"^weights +{TAG}$", stdout, re.MULTILINE)
    loaded = create_model(MODEL, TAG)[0].model.state_dict()
    assert torch.equal(loaded["visual.conv1.weight"], weights["visual.conv1.weight"])


ERRORS = {
    "no photo": (dict(photo="no/such.jpg"), "no/such.jpg: No such file"),
    "no image": (dict(photo=__file__), "not an image"),
    "damaged": (dict(photo="damaged.png"), "cannot read the photo"),
    "model": (dict(model="ViT-X"), "unknown model 'ViT-X'; open_clip has"),
    "convolutions": (dict(model="convnext_tiny", pretrained="random"), "is timm's ConvNeXt: only"),
    "tag": (dict(pretrained="none"), f"no weights 'none'; open_clip has {TAG}"),
    "patch size": (dict(size=[128, 100]), "100 is not divisible by the model's patch size 16"),
    "suffix": (dict(out="lof.gif"), "--out must end in .png, .jpg, .jpeg, .pdf, .svg, got lof.gif"),
    "data": (dict(json="x.png"), "--json must end in .json, got x.png"),
    "small": (dict(size=[64]), "64 gives 16 tokens, too few for 30"),
    "word": (dict(size=["big"]), "--size: must be a whole number above 0, got 'big'"),
    "contamination": (dict(contamination=0.7), "--contamination: must be in (0, 0.5]"),
    "device": (dict(device="tpu"), "--device must be cpu, cuda"),
    "no device": (dict(device="cuda:99"), "--device cuda:99 is not there"),
    "directory": (dict(out=Path(__file__).parent), ": it is a directory"),
    "no file": (dict(npy="."), "--npy: must name a file, got '.'"),
    "no directory": (dict(out=f"{__file__}/lof.png"), "cannot write"),
    "long name": (dict(out=300 * "x"), "File name too long"),
}


@pytest.mark.parametrize(("named", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error_is_one_line(run, named, message):
    code, _, stderr = run("--force", **named)
    assert code == 2
    assert stderr.count("\n") == 1
    assert stderr.startswith("scclip-fast")
    assert message in stderr


def test_missing_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "open_clip.transform")
    monkeypatch.delitem(sys.modules, "scclip_fast.cli.lof_photo")
    monkeypatch.delattr(cli, "lof_photo")
    code, _, stderr = run("--force")
    assert (code, stderr.count("\n")) == (2, 1)
    assert 'needs the package open_clip: pip install "scclip_fast[demo]"' in stderr


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: too much")],
)
def test_out_of_memory(run, monkeypatch, error):
    def find(*args):
        raise error

    monkeypatch.setattr(lof_photo, "find", find)
    code, _, stderr = run("--force")
    assert (code, stderr) == (2, "scclip-fast lof: error: out of memory; try a smaller --size\n")


def test_a_bug_is_not_hidden(run, monkeypatch):
    monkeypatch.setattr(lof_photo, "find", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--force")
