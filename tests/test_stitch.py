"""The last block on the windows of an image at once, against literal forms, window by window.

Mutations, with the test that each made fail: corners rounded to the nearest patch, the mean of the
tokens before the norm for that of queries, keys and values (all methods of
`test_each_method_attends_to_the_whole_image`), one class token for all patches, the middle tokens
of another window (its `scclip`), a sum for the mean (`test_copies_of_a_window_change_nothing`),
queries and keys that are rotated as in their windows
(`test_rotary_embeddings_are_those_of_the_image`).
"""

import published_clip
import published_methods
import pytest
import torch
import torch.nn.functional as F
from published_clip import aggregated, cosines, softmax_scores, split_heads
from test_clip_towers import clip_of
from timm.layers import apply_rot_embed_cat
from tiny_clip import images, photo, tiny_clip, tokenizer
from tiny_proxy import tiny_proxy

from scclip_fast.clip import SCCLIP
from scclip_fast.clip.methods import NACLIP_STD
from scclip_fast.clip.model import METHODS, PROXY_METHODS
from scclip_fast.segment import Segmenter, propagation
from scclip_fast.segment import cosines as segment_cosines

EXACT = 1e-9
SIZES = {"square": (32, 32), "rectangle": (24, 40)}
CORNERS = [(0, 0), (0, 14), (9, 0), (9, 14)]  # 14 and 9 are no multiples of a patch


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def encoder(method):
    second = tiny_proxy().double() if method in PROXY_METHODS else None
    return SCCLIP(tiny_clip().double(), method=method, proxy=second)


class Windows:
    """The windows of an image, and the mean of what they have for a patch of the image."""

    def __init__(self, size, grid, corners=CORNERS):
        self.cells = {}
        for window, corner in enumerate(corners):
            for index in range(grid[0] * grid[1]):
                first = [
                    c * patches // side for c, patches, side in zip(corner, grid, size, strict=True)
                ]
                place = first[0] + index // grid[1], first[1] + index % grid[1]
                self.cells.setdefault(place, []).append((window, index))
        self.grid = max(y for y, _ in self.cells) + 1, max(x for _, x in self.cells) + 1

    def mean(self, tokens):
        """(N, D) of tokens (n, D) of each window, row by row."""
        places = [(y, x) for y in range(self.grid[0]) for x in range(self.grid[1])]
        return torch.stack(
            [torch.stack([tokens[w][i] for w, i in self.cells[p]]).mean(dim=0) for p in places]
        )

    def heads(self, block, tokens):
        """(q, k, v) of each head, (N, d), for tokens (n, D) of each window without class token."""
        of_windows = [split_heads(block, each) for each in tokens]
        heads = zip(*of_windows, strict=True)
        return [[self.mean(part) for part in zip(*head, strict=True)] for head in heads]


def mix(method, q, k, grid, cross):
    """The weights (N, N) of one head; `cross` are those of the middle blocks."""
    if method in ("naclip", "resclip"):
        y, x = (each.double() for each in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        places = torch.stack([y.flatten(), x.flatten()], dim=1)
        omega = torch.exp(-torch.cdist(places, places).square() / (2 * NACLIP_STD**2))
        near = torch.softmax(k @ k.mT * k.shape[-1] ** -0.5 + omega, dim=-1)
        return near if method == "naclip" else 0.5 * near + 0.5 * cross
    return {
        "clip": lambda: softmax_scores(q, k),
        "maskclip": lambda: torch.eye(len(q)).double(),
        "sclip": lambda: softmax_scores(q, q) + softmax_scores(k, k),
        "clearclip": lambda: softmax_scores(q, q),
    }[method]()


def baseline(visual, layers, windows, method):
    """Tokens (N, D) of a method but SC-CLIP; `layers` are those (1 + n, D) of each window."""
    blocks = visual.transformer.resblocks
    last, tokens = blocks[-1], [each[-1][1:] for each in layers]
    heads, cross = windows.heads(last, tokens), [0] * blocks[-1].attn.num_heads
    for i in (5, 6, 7, 8):
        of_block = windows.heads(blocks[i], [each[i - 1][1:] for each in layers])
        cross = [w + softmax_scores(q, k) / 4 for w, (q, k, _) in zip(cross, of_block, strict=True)]
    attended = torch.cat(
        [mix(method, q, k, windows.grid, w) @ v for w, (q, k, v) in zip(cross, heads, strict=True)],
        dim=1,
    )
    out = last.attn.out_proj(attended)
    if method in ("clip", "maskclip", "sclip"):
        out = windows.mean(tokens) + last.ls_1(out)
        out = out + last.ls_2(last.mlp(last.ln_2(out)))
    return out


def scclip(visual, layers, grid, windows, config):
    """Tokens (N, D) of SC-CLIP, the two branches one after the other."""
    last, repaired, middles, levels = visual.transformer.resblocks[-1], [], [], []
    for outputs in layers:
        x, middle = outputs[-1][1:], outputs[config.pre_adjust_idx][1:]
        outliers = published_clip.outlier_mask(x, config)
        x, middle = (published_clip.repaired(t, outliers, *grid) for t in (x, middle))
        repaired.append(aggregated(x, cosines(middle), config.beta))
        middles.append(middle)
        chosen = outputs[config.multi_start_idx : config.multi_end_idx]
        levels.append(torch.stack(chosen).sum(dim=0))
    before = cosines(windows.mean(middles))
    content = published_clip.content_weights(before, config.gamma)
    after = cosines(windows.mean([outputs[config.post_adjust_idx][1:] for outputs in layers]))
    class_tokens = [outputs[-1][:1] for outputs in layers], [level[:1] for level in levels]
    total = 0
    for tokens, class_token in zip(
        (repaired, [level[1:] for level in levels]), class_tokens, strict=True
    ):
        heads = [
            published_clip.blended(k, k, v, content, config.alpha)
            for _, k, v in windows.heads(last, tokens)
        ]
        added = windows.mean([each.expand(len(tokens[0]), -1) for each in class_token])
        out = last.attn.out_proj(torch.cat(heads, dim=1)) + config.res_cls * added
        total = total + aggregated(out, after, config.beta)
    return total


def proxied(visual, layers, grid, windows, proxy, proxy_windows, method):
    """Tokens (N', D) of a method with a proxy, whose maps (D', h', w') are those of each window."""
    tokens = [outputs[-1][1:] for outputs in layers]
    features = proxy_windows.mean([each.flatten(1).T for each in proxy])
    features = features.T.unflatten(1, proxy_windows.grid)
    if method == "lposs":
        projected = visual.ln_post(baseline(visual, layers, windows, "maskclip")) @ visual.proj
        size = proxy_windows.grid
        return published_methods.upsampled_tokens(projected, windows.grid, size), features
    last = visual.transformer.resblocks[-1]
    v = torch.cat([v for _, _, v in windows.heads(last, tokens)], dim=1)
    v = published_methods.upsampled_tokens(v, windows.grid, proxy_windows.grid)
    x = F.normalize(features.flatten(1).T, dim=1)
    logits = 3 * (x @ x.T - 1.2 * (x @ x.T).mean())
    weights = torch.softmax(logits.masked_fill(logits < 0, -torch.inf), dim=1)
    return visual.ln_post(last.attn.out_proj(weights @ v)) @ visual.proj, features


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_attends_to_the_whole_image(method, size):
    model, x = encoder(method), images(4, *size).double()
    visual = model.model.visual
    found = [published_clip.layer_outputs(visual, window) for window in x]
    layers, grid = [outputs for outputs, _ in found], found[0][1]
    windows = Windows(size, grid)
    ((dense, features),) = model.encode_stitched(x, [CORNERS])
    assert features is None
    if method == "scclip":
        tokens = scclip(visual, layers, grid, windows, model.config)
    else:
        tokens = baseline(visual, layers, windows, method)
    expected = F.normalize(visual.ln_post(tokens) @ visual.proj, dim=1)
    assert dense.shape[:3] == (1, *windows.grid)
    torch.testing.assert_close(dense[0].flatten(0, 1), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("method", PROXY_METHODS)
def test_each_method_with_a_proxy(method, size):
    """The patches of the proxy are larger than those of the CLIP, and divide no side."""
    model, x = encoder(method), images(4, *size).double()
    visual = model.model.visual
    found = [published_clip.layer_outputs(visual, window) for window in x]
    _, proxy = model.encode_with_proxy(x)
    windows, proxy_windows = Windows(size, found[0][1]), Windows(size, proxy.grid)
    assert windows.grid != proxy_windows.grid
    ((dense, features),) = model.encode_stitched(x, [CORNERS])
    tokens, expected_map = proxied(
        visual, [o for o, _ in found], found[0][1], windows, proxy.map, proxy_windows, method
    )
    torch.testing.assert_close(features.map[0], expected_map)
    expected = F.normalize(tokens, dim=1)
    torch.testing.assert_close(dense[0].flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_rotary_embeddings_are_those_of_the_image():
    model, pixels = clip_of("EVA02"), images(2, 40, 64).double()
    clip = SCCLIP(model, method="clearclip")
    outputs, grid = clip.layers(pixels)
    tower, block = clip.tower, model.visual.trunk.blocks[-1]
    attention = block.attn
    windows = Windows((40, 64), grid, [(0, 0), (16, 0)])
    assert (grid, windows.grid) == ((5, 8), (7, 8))
    tokens = [block.norm1(each[1:]) for each in outputs[-1]]
    heads = attention.num_heads
    q = windows.mean([F.linear(t, attention.q_proj.weight, attention.q_proj.bias) for t in tokens])
    v = windows.mean([F.linear(t, attention.v_proj.weight, attention.v_proj.bias) for t in tokens])
    q, v = (t.unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, v))
    angles = tower.at(windows.grid)._rotation
    assert len(angles) == 7 * 8
    q = apply_rot_embed_cat(q, angles)
    attended = (softmax_scores(q, q) @ v).transpose(0, 1).flatten(1)
    expected = tower.unit_features(tower.out_proj(block, attended))
    ((dense, _),) = clip.encode_stitched(pixels, [[(0, 0), (16, 0)]])
    torch.testing.assert_close(dense[0].flatten(0, 1), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("method", [*METHODS, *PROXY_METHODS])
def test_copies_of_a_window_change_nothing(method):
    model, x = encoder(method), images(1, 32, 40).double()
    ((alone, _),) = model.encode_stitched(x, [[(0, 0)]])
    ((dense, _),) = model.encode_stitched(x.expand(3, -1, -1, -1), [3 * [(0, 0)]])
    torch.testing.assert_close(dense, alone)


@pytest.mark.parametrize("method", ["scclip", "maskclip", *PROXY_METHODS])
def test_a_single_window_without_class_token_as_key(method):
    """The last block of these methods has the patches alone, with stitching and without."""
    model, x = encoder(method), images(1, 32, 40).double()
    ((dense, _),) = model.encode_stitched(x, [[(0, 0)]])
    torch.testing.assert_close(dense, model.encode_dense(x))


def test_half_precision():
    clip = tiny_clip()
    x = images(4, 32, 32)
    ((expected, _),) = SCCLIP(clip, method="clearclip").encode_stitched(x, [CORNERS])
    model = SCCLIP(tiny_clip(dtype=torch.float16), method="clearclip")
    ((dense, _),) = model.encode_stitched(x, [CORNERS])
    assert dense.dtype == torch.float16
    assert 0 < (dense - expected).abs().max() < 0.02


@pytest.mark.parametrize("method", ["scclip", "naclip"])
def test_windows_of_a_single_patch(method):
    """The last block attends to the image's patches, though each window has but one."""
    model, x = encoder(method), images(6, 4, 4).double()
    corners = [(y, x) for y in (0, 4) for x in (0, 4, 8)]
    ((dense, _),) = model.encode_stitched(x, [corners])
    assert dense.shape[:3] == (1, 2, 3)
    assert not torch.allclose(dense.flatten(0, 2), model.encode_dense(x).flatten(0, 2))


def test_several_images():
    """Images with other numbers of windows have the bits that each has alone."""
    model, x = SCCLIP(tiny_clip()), images(7, 32, 32)
    corners = [CORNERS, [(0, 0)], [(0, 0), (6, 0)]]
    together = model.encode_stitched(x, corners)
    for (dense, _), windows, of_image in zip(together, x.split([4, 1, 2]), corners, strict=True):
        ((alone, _),) = model.encode_stitched(windows, [of_image])
        assert torch.equal(dense, alone)


@pytest.fixture(scope="module")
def make():
    def make(method="scclip", **settings):
        settings = (
            dict(templates=["a {}."], short_side=48, slide_crop=32, slide_stride=14) | settings
        )
        return Segmenter(encoder(method), tokenizer(), ["sky", "tree", "sea"], **settings)

    return make


@pytest.mark.parametrize("method", ["scclip", "lposs"])
def test_the_segmenter(make, method):
    stitched, image = make(method, stitch=True), photo(48, 60)
    pixels = stitched._resized(image.permute(2, 0, 1))
    corners = [(rows.start, columns.start) for rows, columns in stitched._places((48, 60))]
    assert len(corners) == 9 and corners[-1] == (16, 28)
    crops = torch.cat([pixels[:, :, y : y + 32, x : x + 32] for y, x in corners])
    ((dense, features),) = stitched.encoder.encode_stitched(crops, [corners])
    cosines = dense[0].float() @ stitched.text_features.T
    grid = cosines.shape[:2]
    assert grid == ((12, 15) if method == "scclip" else features.grid)
    if method == "lposs":
        middles = [
            (torch.arange(n) + 0.5) * side / n for n, side in zip(grid, (48, 60), strict=True)
        ]
        places = torch.cartesian_prod(*middles)
        tokens = features.tokens[0].float()
        cosines = propagation.propagate(cosines.flatten(0, 1), tokens, places).unflatten(0, grid)
    maps = F.interpolate(cosines.permute(2, 0, 1)[None], (48, 60), mode="bilinear")
    expected = (40 * maps[0]).softmax(dim=0)
    torch.testing.assert_close(stitched.probabilities(image), expected)
    assert not torch.allclose(expected, make(method).probabilities(image))


def test_batches_of_images(make, monkeypatch):
    """The windows of several images share the blocks before the last, whatever the batch."""
    stitched, batches = make(stitch=True), []
    photos = [photo(48, 60), photo(90, 50), photo(48, 48), photo(60, 48)]
    alone = [stitched.probabilities(one) for one in photos]

    def encode_stitched(windows, corners):
        batches.append([len(of_image) for of_image in corners])
        return original(windows, corners)

    original = stitched.encoder.encode_stitched
    monkeypatch.setattr(stitched.encoder, "encode_stitched", encode_stitched)
    for most, expected in ((128, [[9, 15, 9, 9]]), (20, [[9], [15], [9, 9]])):
        monkeypatch.setattr(segment_cosines, "MAX_WINDOWS", most)
        for bands, probabilities in zip(stitched.bands(photos), alone, strict=True):
            assert torch.equal(torch.cat([p for _, p in bands], dim=1), probabilities)
        assert batches == expected
        batches.clear()


@pytest.mark.parametrize("settings", [dict(slide_crop=None), dict(short_side=None)], ids=str)
def test_images_in_one_window(make, settings):
    """An image smaller than a window, and one that is not cut, have a grid of their own."""
    image, stitched = photo(20, 29), make(stitch=True, **settings)
    probabilities = stitched.probabilities(image)
    torch.testing.assert_close(probabilities, make(**settings).probabilities(image))


def test_what_is_refused(make):
    with pytest.raises(TypeError, match="stitch must be a bool, got int"):
        make(stitch=1)
    x, model = images(3, 32, 32).double(), encoder("sclip")
    for corners, message in {
        ((0, 0), (0, 8)): "corners must be of 3 windows, got 2",
        ((0, 0), (0, 8), (0, -8)): r"pairs of integers of at least 0, got \(0, -8\)",
        ((0, 0), (0, 8), (0, 8.0)): r"pairs of integers of at least 0, got \(0, 8.0\)",
        ((0, 0), (0, 8), (0,)): r"pairs of integers of at least 0, got \(0,\)",
        ((0, 0), (0, 8), (0, 44)): r"cover the image, but its patch \(0, 10\) lies in none",
    }.items():
        with pytest.raises(ValueError, match=message):
            model.encode_stitched(x, [corners])
