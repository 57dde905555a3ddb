"""The last block's attention to all windows of an image, against explicit softmax matrices."""

import pytest
import torch
from tiny_clip import PATCH, images, photo, tiny_clip, tokenizer
from tiny_proxy import tiny_proxy

import scclip_fast as sf
from scclip_fast.clip import SCCLIP, SCCLIPConfig
from scclip_fast.clip.model import METHODS, PROXY_METHODS
from scclip_fast.segment import Segmenter

SIZES = {"square": (32, 32), "rectangle": (24, 40)}
CORNERS = torch.tensor([[0, 0], [0, 14], [9, 14]])  # 14 and 9 are no multiples of a patch
ATTENTION_ALONE = dict.fromkeys(("repair", "pre_aggregate", "post_aggregate"), False)


def encoder(method, **config):
    second = tiny_proxy("dinov3").double() if method in PROXY_METHODS else None
    return SCCLIP(tiny_clip().double(), SCCLIPConfig(**config), method, second)


def softmax_attention(q, k, v, bias=0):
    """(heads, N, d) of queries (heads, N, d) and keys and values (heads, M, d) of all windows."""
    weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(dim=-1)
    return weights @ v


def of_all(heads):
    """The tokens (heads, W N, d) of all windows (W, heads, N, d)."""
    return torch.cat(list(heads), dim=1)


def gaussian(corner, grid):
    """NACLIP's bias of the patches of a window for the tokens of all, one pair at a time."""
    patches = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    places = [[(y / PATCH + r, x / PATCH + c) for r, c in patches] for y, x in CORNERS.tolist()]
    own = places[CORNERS.tolist().index(corner)]
    bias = []
    for place in own:
        row = []
        for window in places:
            squares = [(place[0] - y) ** 2 + (place[1] - x) ** 2 for y, x in window]
            row += [0.0, *(2.718281828459045 ** (-square / (2 * 5**2)) for square in squares)]
        bias.append(row)
    return torch.tensor(bias, dtype=torch.float64)


def literal(name, model, x):
    """The patches (W, N, D) of each window after the last block, window by window."""
    outputs, grid = model.layers(x)
    tower = model.tower
    last, tokens = tower.blocks[-1], outputs[-1]
    q, k, v = tower.qkv(last, tokens)
    found = []
    for window, corner in enumerate(CORNERS.tolist()):
        own = tokens[window][None]
        if name == "sclip":
            attended = softmax_attention(q[window], of_all(q), of_all(v))
            attended = attended + softmax_attention(k[window], of_all(k), of_all(v))
        elif name == "clearclip":
            attended = softmax_attention(q[window], of_all(q), of_all(v))
        elif name in ("naclip", "resclip"):
            queries = k[window][:, 1:]
            attended = softmax_attention(queries, of_all(k), of_all(v), gaussian(corner, grid))
            if name == "resclip":
                layers = [tower.qkv(tower.blocks[i], outputs[i - 1]) for i in (5, 6, 7, 8)]
                cross = [
                    softmax_attention(qs[window][:, 1:], of_all(ks), of_all(v))
                    for qs, ks, _ in layers
                ]
                attended = 0.5 * attended + 0.5 * sum(cross) / 4
        else:
            attended = softmax_attention(q[window], of_all(k), of_all(v))
        attended = tower.merge_heads(last, attended[None])
        if name in ("clip", "sclip"):
            attended = tower.add_residual_and_mlp(last, own, attended)
        found.append(attended[:, -grid[0] * grid[1] :])
    return torch.cat(found)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ["clip", "sclip", "clearclip", "naclip", "resclip"])
def test_each_window_attends_to_all(name, size):
    model, x = encoder(name), images(3, *size).double()
    found = model.encode_dense(x, CORNERS)
    expected = model.tower.unit_features(literal(name, model, x))
    torch.testing.assert_close(found.flatten(1, 2), expected)
    assert not torch.allclose(found, model.encode_dense(x))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("content", [True, False])
def test_the_blended_attention_of_scclip(content, size):
    model = encoder(
        "scclip", **ATTENTION_ALONE, multi_level=False, res_cls=0.0, content_attention=content
    )
    x = images(3, *size).double()
    outputs, _ = model.layers(x)
    tower, config = model.tower, model.config
    patches, middle = outputs[-1][:, 1:], outputs[config.pre_adjust_idx][:, 1:]
    q, k, v = (of_all(heads)[None] for heads in tower.qkv(tower.blocks[-1], patches))
    q = k if config.self_attention == "kk" else q
    if content:
        all_middle = middle.flatten(0, 1)[None]
        settings = dict(gamma=config.gamma, alpha=config.alpha, backend="reference")
        attended = sf.blended_attention(q, k, v, all_middle, **settings)
    else:
        attended = softmax_attention(q, k, v)
    dense = tower.merge_heads(tower.blocks[-1], attended).unflatten(1, (3, -1))[0]
    found = model.encode_dense(x, CORNERS).flatten(1, 2)
    torch.testing.assert_close(found, tower.unit_features(dense))


@pytest.mark.parametrize("name", [*METHODS, *PROXY_METHODS])
def test_copies_of_a_window_change_nothing(name):
    """A softmax over each key three times has the same result as one over each key once."""
    model, x = encoder(name), images(1, 32, 40).double()
    alone = model.encode_dense(x)
    found = model.encode_dense(x.expand(3, -1, -1, -1), torch.full((3, 2), 8))
    torch.testing.assert_close(found, alone.expand_as(found))


def test_content_attention_of_the_proxy():
    model, x = encoder("proxyclip"), images(3, 32, 32).double()
    found = model.encode_dense(x, CORNERS)
    outputs, grid = model.layers(x)
    tower, tokens = model.tower, model.proxy(x).tokens
    _, _, v = tower.qkv(tower.blocks[-1], outputs[-1][:, 1:])
    values = v.transpose(1, 2).flatten(2)
    assert tokens.shape[1] == values.shape[1] == grid[0] * grid[1]
    unit = torch.nn.functional.normalize(tokens.flatten(0, 1).double(), dim=-1)
    similarity = unit @ unit.T
    logits = 3 * (similarity - 1.2 * similarity.mean())
    weights = logits.masked_fill(logits < 0, -torch.inf).softmax(dim=-1)
    attended = (weights @ values.flatten(0, 1)).unflatten(0, (3, -1))
    expected = tower.unit_features(tower.out_proj(tower.blocks[-1], attended))
    torch.testing.assert_close(found.flatten(1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def make():
    model = encoder("scclip")

    def make(**settings):
        settings = (
            dict(templates=["a {}."], short_side=48, slide_crop=32, slide_stride=14) | settings
        )
        return Segmenter(model, tokenizer(), ["sky", "tree", "sea"], **settings)

    return make


def test_segmenter_stitches_the_windows_of_an_image(make):
    photos = [photo(48, 60), photo(90, 50), photo(48, 48)]
    stitched, apart = make(stitch=True), make()
    alone = [stitched.probabilities(one) for one in photos]
    for bands, expected in zip(stitched.bands(photos), alone, strict=True):
        assert torch.equal(torch.cat([p for _, p in bands], dim=1), expected)
    assert not torch.allclose(alone[0], apart.probabilities(photos[0]))
    pixels = stitched._resized(photos[0].permute(2, 0, 1))
    (maps,) = stitched._maps([pixels])
    corners = [(rows.start, columns.start) for rows, columns in stitched._places((48, 60))]
    assert len(corners) == 9 and corners[-1] == (16, 28)
    crops = torch.cat([pixels[:, :, y : y + 32, x : x + 32] for y, x in corners])
    dense = stitched.encoder.encode_dense(crops, torch.tensor(corners)).float()
    cosines = (dense @ stitched.text_features.T).permute(0, 3, 1, 2)
    first = maps.rows(0, 2)[:, :, :14]  # the first window's alone
    upsampled = torch.nn.functional.interpolate(cosines[:1], (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(first, upsampled[:, :2, :14])


@pytest.mark.parametrize("settings", [dict(slide_crop=None), dict(slide_crop=64, short_side=None)])
def test_a_single_window_has_nothing_to_stitch(make, settings):
    image = photo(48, 60)
    stitched, apart = make(stitch=True, **settings), make(**settings)
    assert torch.equal(stitched.probabilities(image), apart.probabilities(image))


def test_what_is_refused(make):
    with pytest.raises(TypeError, match="stitch must be a bool, got int"):
        make(stitch=1)
    x, model = images(3, 32, 32).double(), encoder("sclip")
    for corners, found in ((CORNERS[:2], r"\(2, 2\)"), (CORNERS.tolist(), "list")):
        with pytest.raises(ValueError, match=rf"corners must be a tensor \(3, 2\), got {found}"):
            model.encode_dense(x, corners)
