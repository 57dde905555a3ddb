"""Proxies of every kind, and the methods that use them, equal their literal forms.

Mutations, with the test that each made fail: no denormalisation, a register taken for a patch
(`test_features`); the mean without its factor, values of the class token's row, no output
projection (`test_proxyclip`).
"""

import json
from functools import partial

import published_clip
import published_methods
import pytest
import torch
from cli_runs import save_tiny, segment
from PIL import Image
from tiny_clip import images, tiny_clip
from tiny_proxy import PROXIES, tiny_model, tiny_proxy
from torch import nn
from transformers import BitImageProcessor

from scclip_fast.clip import SCCLIP
from scclip_fast.clip.proxy import CLIP_MEAN, CLIP_STD, Proxy, load_proxy

EXACT = 1e-9


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def as_trained(x, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """CLIP's normalisation undone, and the proxy's done."""
    clip_mean, clip_std, mean, std = (
        torch.tensor(t)[:, None, None] for t in (CLIP_MEAN, CLIP_STD, mean, std)
    )
    return (x * clip_std + clip_mean - mean) / std


@pytest.mark.parametrize("name", PROXIES)
def test_features(name):
    _, patch, prefix = PROXIES[name]
    model = tiny_model(name)
    x = images(2, 3 * patch, 5 * patch)
    features = Proxy(model)(x)
    assert features.patch_size == patch and features.grid == (3, 5)
    if "timm" in name:
        tokens = model.forward_features(as_trained(x))
    else:
        options = dict(interpolate_pos_encoding=True) if name == "dino" else {}
        tokens = model(as_trained(x), **options).last_hidden_state
    assert tokens.shape[1] == 15 + prefix
    torch.testing.assert_close(features.tokens, tokens[:, prefix:], rtol=1e-4, atol=1e-5)


def test_means_of_its_own():
    model, x, ones = tiny_model("dinov2"), images(1, 12, 18), (1.0, 1.0, 1.0)
    own = Proxy(model, mean=(0.5, 0.5, 0.5), std=ones)(x).tokens
    expected = model(as_trained(x, (0.5, 0.5, 0.5), ones)).last_hidden_state[:, 1:]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_proxyclip():
    """Square and rectangle, batches of 1 and 3, proxies with smaller, equal and larger patches."""
    model = tiny_clip(layers=3).double()
    for name, batch, size in [
        ("dinov3", 3, (24, 56)),
        ("dinov2", 1, (48, 48)),
        ("dino", 3, (16, 40)),
    ]:
        encoder = SCCLIP(model, method="proxyclip", proxy=tiny_proxy(name).double())
        x = images(batch, *size).double()
        features = encoder.proxy(x)
        dense = encoder(x)
        assert dense.shape[1:3] == features.grid
        for found, image, feature_map in zip(dense, x, features.map, strict=True):
            visual = model.visual
            layers, grid = published_clip.layer_outputs(visual, image)
            tokens = published_methods.proxyclip(visual, layers, grid, feature_map)
            ref = nn.functional.normalize(visual.ln_post(tokens) @ visual.proj, dim=-1)
            torch.testing.assert_close(found.flatten(0, 1), ref, rtol=0, atol=EXACT)


def test_sides_that_no_patch_divides_and_small_images():
    """Each model gets whole patches of its own; an image may be a single patch."""
    encoder = SCCLIP(tiny_clip(layers=3), method="proxyclip", proxy=tiny_proxy("dinov2"))
    assert encoder(images(1, 37, 50)).shape[1:3] == (6, 8)
    assert encoder(images(3, 5, 5)).shape == (3, 1, 1, 24)


def test_one_graph():
    torch._dynamo.reset()
    encoder = SCCLIP(tiny_clip(layers=3), method="proxyclip", proxy=tiny_proxy("dinov2"))
    x = images(2, 36, 48)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), encoder(x))


def test_half_precision():
    """The CLIP's dtype is that of the features, and the proxy keeps its own."""
    x, proxy = images(2, 36, 48), tiny_proxy("dinov2")
    expected = SCCLIP(tiny_clip(layers=3), method="proxyclip", proxy=proxy)(x)
    half = SCCLIP(tiny_clip(layers=3, dtype=torch.float16), method="proxyclip", proxy=proxy)
    found = half(x)
    assert found.dtype == torch.float16 and half.proxy is proxy
    assert nn.functional.cosine_similarity(found.float(), expected, dim=-1).median() > 0.9999


def test_the_proxy_is_the_users_and_moves_along():
    model = tiny_model("dinov2").train().requires_grad_(True)
    encoder = SCCLIP(tiny_clip(layers=2), method="proxyclip", proxy=model)
    assert encoder.proxy.model is model and model.training
    assert all(p.requires_grad for p in model.parameters())
    assert next(encoder.to("meta").proxy.parameters()).is_meta


def test_what_is_no_proxy():
    model = tiny_clip(layers=2)
    with pytest.raises(ValueError, match="'proxyclip' needs proxy"):
        SCCLIP(model, method="proxyclip")
    with pytest.raises(ValueError, match=r"proxy is for the methods proxyclip.*got 'naclip'"):
        SCCLIP(model, method="naclip", proxy=tiny_proxy())
    with pytest.raises(ValueError, match=r"vision transformer of timm or transformers.*got Linear"):
        SCCLIP(model, method="proxyclip", proxy=nn.Linear(2, 2))


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of a proxy, whose processor has means of its own."""
    folder = tmp_path / "proxy"
    tiny_model("dinov2").save_pretrained(folder)
    BitImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[1, 1, 1]).save_pretrained(folder)
    return folder


def test_the_command_takes_a_proxy(folder, tmp_path):
    photo = tmp_path / "photo.png"
    Image.effect_noise((60, 40), 50).save(photo)
    model = save_tiny(tmp_path)
    command = partial(segment, photo, "--json", model=model, classes="sky, tree")
    proxies = ["--method", "proxyclip", "--proxy", folder]
    assert command("--out", tmp_path / "out", *proxies)[0] == 0
    settings = json.loads((tmp_path / "out" / "photo.json").read_text())["settings"]
    assert (settings["method"], settings["proxy"]) == ("proxyclip", str(folder))
    for options, reason in [
        (proxies[:2], "--method proxyclip needs --proxy"),
        (proxies[2:], "--method scclip has no use for --proxy"),
        ([*proxies[:3], tmp_path / "nothing"], "proxy must be dino, dinov2, dinov3, a folder"),
    ]:
        code, _, stderr = command("--out", tmp_path / "other", *options)
        assert (code, stderr.count("\n")) == (2, 1) and reason in stderr


def test_load_a_folder(folder):
    proxy = load_proxy(str(folder))
    x = images(1, 12, 18)
    expected = Proxy(tiny_model("dinov2"), (0.5, 0.4, 0.3), (1, 1, 1))(x).map
    torch.testing.assert_close(proxy(x).map, expected)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match="cannot load the proxy"):
        load_proxy(str(folder))
