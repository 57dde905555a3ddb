"""SC-CLIP and its baselines equal the published algorithms at every switch, size and precision."""

from dataclasses import replace
from itertools import product

import open_clip
import published_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from tiny_clip import TEXT, images, randomise, tiny_clip

from scclip_fast import calibration
from scclip_fast.clip import METHODS, SCCLIP, SCCLIPConfig
from scclip_fast.clip.config import STAGES

EXACT = 1e-9  # features are float64 unit vectors: a larger difference is another formula
SIZES = [(32, 32), (48, 48), (24, 56)]  # the training size, a larger one, a rectangle
TOWERS = {
    "ViT-B": dict(quick_gelu=True),
    "ViT-L": dict(layers=24),
    "layer-scale": dict(ls_init_value=0.5),
    "CLIPA": dict(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    """A tower of 4 blocks, float64."""
    return tiny_clip(layers=4).double()


def assert_plain(encoder, x, tolerance=EXACT):
    """The features of every image of x equal the published ones of that image alone."""
    for features, image in zip(encoder.encode_dense(x), x, strict=True):
        expected = published_clip.encode_dense(encoder.model, image, encoder.config, encoder.method)
        torch.testing.assert_close(features, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_scclip_is_the_published_one(name, size):
    encoder = SCCLIP(tiny_clip(**TOWERS[name]).double())
    assert_plain(encoder, images(2, *size).double())


@pytest.mark.parametrize("on", list(product([False, True], repeat=5)), ids=str)
def test_switches(model, on):
    config = replace(SCCLIPConfig.for_depth(4), **dict(zip(STAGES, on, strict=True)))
    assert_plain(SCCLIP(model, config), images(1, 28, 36).double())


@pytest.mark.parametrize(
    "changed",
    [
        dict(self_attention="qk"),
        dict(self_attention="qk", content_attention=False),
        dict(alpha=0.2, gamma=7.0),
        dict(beta=0.7, res_cls=-0.5),
        dict(outlier_n_neighbors=5, outlier_contamination=0.2),
        dict(outlier_score="norm"),
        dict(outlier_score="either"),
        dict(pre_adjust_idx=0, post_adjust_idx=2, multi_start_idx=1, multi_end_idx=3),
    ],
    ids=str,
)
def test_settings(model, changed):
    x = images(1, 28, 36).double()
    config = replace(SCCLIPConfig.for_depth(4), **changed)
    assert_plain(SCCLIP(model, config), x)
    assert not torch.allclose(SCCLIP(model, config)(x), SCCLIP(model)(x), atol=1e-6)


def test_float32_on_a_real_tower():
    """The error of ViT-B/16 at 224 pixels is about float32's rounding, relative to the features.

    With this seed no similarity is within 4e-6 of a threshold, so rounding decides no comparison.
    """
    settings = open_clip.get_model_config("ViT-B-16-quickgelu")
    torch.manual_seed(0)
    model = CLIP(settings["embed_dim"], settings["vision_cfg"], TEXT, quick_gelu=True).eval()
    randomise(model)
    encoder = SCCLIP(model)
    x = images(1, 224, 224)
    expected = published_clip.encode_dense(model, x[0], encoder.config)
    error = (encoder(x)[0] - expected).abs().max() / expected.abs().max()
    assert error < 5e-6


@pytest.mark.parametrize("method", ["maskclip", "sclip", "clearclip"])
def test_baselines(method):
    model = tiny_clip(layers=3, ls_init_value=0.5).double()
    encoder = SCCLIP(model, method=method)
    for size in SIZES:
        assert_plain(encoder, images(2, *size).double())


def test_clip_is_open_clips_own():
    model = tiny_clip(layers=3, output_tokens=True).double()
    x = images(2, 32, 32).double()
    tokens = F.normalize(model.visual(x)[1] @ model.visual.proj, dim=-1)
    dense = SCCLIP(model, method="clip").encode_dense(x)
    torch.testing.assert_close(dense.flatten(1, 2), tokens, rtol=0, atol=EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_as_it_was(model, method):
    x = images(2, 32, 32).double()
    before, state = model.encode_image(x), {k: v.clone() for k, v in model.state_dict().items()}
    SCCLIP(model, method=method).encode_dense(images(1, 40, 28).double())
    assert torch.equal(model.encode_image(x), before)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_images(model, method, size):
    encoder = SCCLIP(model, method=method)
    x = images(3, *size).double()
    x[1] *= 3  # other statistics than the other images
    alone = torch.cat([encoder.encode_dense(image[None]) for image in x])
    dense = encoder.encode_dense(x)
    assert dense.shape == (3, size[0] // 4, size[1] // 4, 24)
    torch.testing.assert_close(dense, alone, rtol=0, atol=EXACT)
    torch.testing.assert_close(dense.norm(dim=-1), torch.ones(dense.shape[:3]).double())


def test_few_tokens_in_a_batch(model):
    """16 tokens are too few for 30 neighbours: rounding must not choose an outlier among them."""
    encoder = SCCLIP(model)
    x = images(16, 16, 16).double()
    alone = torch.cat([encoder.encode_dense(image[None]) for image in x])
    torch.testing.assert_close(encoder.encode_dense(x), alone, rtol=0, atol=EXACT)


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (21, 28), (5, 8), (3, 1), (64, 6)], ids=str)
def test_positions(model, grid):
    visual = model.visual
    positions = SCCLIP(model).tower.positions(grid)
    if grid == visual.grid_size:
        assert torch.equal(positions, visual.positional_embedding)
    else:
        expected = published_clip.embedding(visual, grid)
        torch.testing.assert_close(positions, expected, rtol=0, atol=EXACT)
        resized = visual.positional_embedding[1:].unflatten(0, (8, 8)).permute(2, 0, 1)[None]
        antialiased = F.interpolate(resized, grid, mode="bicubic", antialias=True)
        assert not torch.allclose(positions[1:], antialiased[0].flatten(1).T, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "whole"), [((33, 45), (32, 44)), ((35, 47), (36, 48)), ((1, 40), (4, 40))], ids=str
)
def test_sides_that_the_patch_does_not_divide(model, size, whole):
    encoder = SCCLIP(model, method="sclip")
    x = images(2, *size).double()
    resized = F.interpolate(x, whole, mode="bicubic", antialias=True)
    torch.testing.assert_close(encoder(x), encoder(resized), rtol=0, atol=0)
    assert encoder(x).shape[1:3] == (whole[0] // 4, whole[1] // 4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_short_precisions(name, dtype, monkeypatch):
    scores = []

    def lof_scores(tokens, n_neighbors):
        scores.append((tokens.dtype, original(tokens, n_neighbors).dtype))
        return original(tokens, n_neighbors)

    original = calibration.lof_scores
    monkeypatch.setattr(calibration, "lof_scores", lof_scores)
    x = images(2, 40, 34)  # resized, to a grid that differs from the model's
    expected = SCCLIP(tiny_clip(layers=4), method=name).encode_dense(x)
    scores.clear()
    dense = SCCLIP(tiny_clip(layers=4, dtype=dtype), method=name).encode_dense(x)
    assert dense.dtype == dtype and dense.shape == expected.shape
    assert scores == ([(dtype, torch.float32)] if name == "scclip" else [])
    cosine = F.cosine_similarity(dense.float(), expected, dim=-1)
    # The median, because an outlier or threshold that rounding decides moves a few patches visibly.
    assert cosine.median() > (0.9999 if dtype == torch.float16 else 0.999)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 3, 32, 32),
        torch.full((2, 3, 24, 40), 1.7),
        torch.rand(2, 3, 4, 4),
        torch.rand(2, 3, 4, 8),
        torch.rand(1, 3, 12, 12),
        torch.rand(0, 3, 32, 32),
    ],
    ids=["zeros", "constant", "a-patch", "two-patches", "fewer-than-neighbours", "no-image"],
)
def test_degenerate_images(method, x):
    encoder = SCCLIP(tiny_clip(layers=4), method=method)
    dense = encoder.encode_dense(x)
    assert dense.shape == (len(x), x.shape[2] // 4, x.shape[3] // 4, 24)
    assert dense.isfinite().all()


def test_tokens_all_alike():
    """A constant image has N equal tokens without positions: no outlier and one feature."""
    model = tiny_clip(layers=4)
    model.visual.positional_embedding.zero_()
    dense = SCCLIP(model).encode_dense(torch.full((1, 3, 32, 32), 0.3)).flatten(1, 2)
    torch.testing.assert_close(dense, dense[:, :1].expand_as(dense), rtol=0, atol=1e-5)


def test_what_is_no_method_or_image(model):
    with pytest.raises(ValueError, match=r"one of scclip, clip, .*, got 'gem'"):
        SCCLIP(model, method="gem")
    encoder = SCCLIP(model)
    assert encoder.patch_size == 4
    with pytest.raises(TypeError, match=r"floating tensor, got torch\.uint8"):
        encoder.encode_dense(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match="floating tensor, got list"):
        encoder.encode_dense([[0.0]])
    for shape in [(3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32)]:
        with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
            encoder.encode_dense(torch.zeros(shape))
