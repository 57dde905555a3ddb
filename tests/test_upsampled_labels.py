"""`upsampled_labels` against `F.interpolate` and argmax."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, RUNS

import scclip_fast as sf
from scclip_fast.chunked import tiles

pytestmark = pytest.mark.usefixtures("poisoned")

#: (C, h, w) and (H, W)
SHAPES = [
    ((1, 1, 1), (1, 1)),
    ((2, 1, 1), (5, 3)),
    ((3, 1, 9), (4, 1)),
    ((5, 14, 14), (33, 47)),
    ((4, 21, 13), (84, 131)),
    ((7, 24, 36), (24, 50)),  # one side keeps its size
    ((7, 24, 36), (24, 36)),
    ((6, 60, 47), (13, 17)),
    ((3, 9, 300), (27, 100)),  # a third: every pixel has one source
    ((2, 288, 288), (17, 700)),
    ((151, 6, 6), (20, 21)),
    ((256, 3, 4), (9, 8)),
    ((257, 4, 3), (8, 9)),
    ((1203, 3, 3), (7, 7)),
]


@pytest.fixture(params=[pytest.param(r.values, id=r.id, marks=r.marks) for r in RUNS])
def run(request):
    """(device, backend)."""
    return request.param


def runs_and_dtypes():
    cases = []
    for run in RUNS:
        for dtype in (*DTYPES, torch.float64):
            if run.values[1] == "torch" or dtype != torch.float64:
                name = f"{run.id}-{str(dtype).removeprefix('torch.')}"
                cases.append(pytest.param(*run.values, dtype, id=name, marks=run.marks))
    return cases


def assert_best(found, maps, size):
    """Asserts the labels and values of maps (B, C, h, w), up to the rounding of the positions.

    A position is at most h or w and is rounded three times. Where two classes are closer than the
    error that follows from it, either label is right.
    """
    labels, values = (t.cpu() for t in found)
    classes = maps.shape[1]
    assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int16)
    assert values.dtype == (torch.float64 if maps.dtype == torch.float64 else torch.float32)
    assert labels.shape == values.shape == (len(maps), *size)
    scores = F.interpolate(maps.cpu().double(), size, mode="bilinear", align_corners=False)
    best = scores.amax(dim=1)
    unit = torch.finfo(values.dtype).eps / 2
    error = (4 * max(maps.shape[2:]) + 8) * unit * 2 * maps.double().abs().max().item()
    assert (values.double() - best).abs().max() <= error
    assert labels.long().max() < classes
    assert (scores.gather(1, labels[:, None].long())[:, 0] >= best - 2 * error).all()


@pytest.mark.parametrize(("device", "backend", "dtype"), runs_and_dtypes())
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_equals_interpolate_and_argmax(device, backend, dtype, shape, size):
    if shape[0] == 1203 and backend == "triton" and device == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter runs 1203 classes in one dtype")
    maps = torch.randn(1 if shape[0] > 100 else 2, *shape, device=device).to(dtype)
    found = sf.upsampled_labels(maps, size, backend=backend)
    assert_best(found, maps, size)
    alone = sf.upsampled_labels(maps[-1], size, backend=backend)
    assert all(torch.equal(one, several[-1]) for one, several in zip(alone, found, strict=True))


@pytest.mark.parametrize("size", [(1000, 700), (40, 1400), (77, 1)], ids=str)
def test_positions_are_rounded_as_by_torch(size):
    """Without the fused multiply-add, values are off by 4e-5 of these maps."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch's loops for this processor do not fuse products and sums")
    maps = torch.randn(1, 1, 288, 257)
    _, values = sf.upsampled_labels(maps, size, backend="torch")
    expected = F.interpolate(maps, size, mode="bilinear")[:, 0]
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(12, 20), (24, 40), (3, 5), (6, 20), (6, 10)], ids=str)
def test_the_first_of_ties(run, dtype, size):
    """Small integers between halves and quarters are exact, so that equal classes tie."""
    device, backend = run
    maps = torch.randint(-2, 3, (2, 9, 6, 10), device=device).to(dtype)
    maps[:, 5:] = maps[:, 1:5]
    labels, values = sf.upsampled_labels(maps, size, backend=backend)
    scores = F.interpolate(maps.cpu().float(), size, mode="bilinear")
    best, first = scores.max(dim=1)
    assert torch.equal(values.cpu(), best) and torch.equal(labels.cpu().long(), first)
    assert labels.max() < 5


def test_equal_maps_have_the_first_label(run):
    device, backend = run
    labels, values = sf.upsampled_labels(
        torch.full((9, 3, 4), -7.0, device=device), (8, 9), backend=backend
    )
    assert not labels.any() and (values == -7).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("size", [(12, 20), (6, 10), (6, 20), (12, 10), (2, 10)], ids=str)
def test_nan_never_wins(run, size):
    """NaN reaches the pixels that it reaches in `F.interpolate`, and counts as -inf there."""
    device, backend = run
    maps = torch.randint(-2, 3, (2, 4, 6, 10), device=device).float()
    maps[0, 0, 2, 3] = maps[0, 2, 5, 9] = maps[1, 3, 0] = torch.nan
    maps[1, 1, 4] = -torch.inf
    maps[0, :, 3, 6] = torch.nan  # every class
    labels, values = sf.upsampled_labels(maps, size, backend=backend)
    scores = F.interpolate(maps.cpu(), size, mode="bilinear")
    best, first = scores.nan_to_num(-torch.inf, neginf=-torch.inf).max(dim=1)
    assert torch.equal(values.cpu(), best) and torch.equal(labels.cpu().long(), first)
    nothing = scores.isnan().all(dim=1)
    assert nothing.any() == (size != (2, 10))  # row 3 enters no pixel at a third of the rows
    assert (values.cpu()[nothing] == -torch.inf).all() and not labels.cpu()[nothing].any()


@pytest.mark.parametrize("classes", [1, 255, 256, 257])
def test_the_last_class(run, classes):
    device, backend = run
    maps = torch.zeros(classes, 2, 2, device=device)
    maps[-1] = 1
    labels, _ = sf.upsampled_labels(maps, (3, 3), backend=backend)
    assert (labels.long() == classes - 1).all()
    assert labels.dtype == (torch.uint8 if classes < 257 else torch.int16)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_labels_of_very_many_classes(backend):
    maps = torch.arange(2**15 + 1.0)[:, None, None]
    for some, dtype in ((maps[:-1], torch.int16), (maps, torch.int32)):
        labels, _ = sf.upsampled_labels(some, (1, 2), backend=backend)
        assert labels.dtype == dtype and labels.tolist() == [[len(some) - 1] * 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(run, dtype):
    """Maps with their classes last, an offset and gaps, or one memory for all classes."""
    device, backend = run
    views = (
        torch.randn(2, 5, 7, 4, device=device).permute(0, 3, 1, 2),
        torch.randn(2, 9, 7, 16, device=device)[:, 1::2, 2:, 3::2],
        torch.randn(4, 2, 7, 5, device=device).permute(1, 0, 3, 2),
        torch.randn(1, 1, 5, 7, device=device).expand(2, 4, 5, 7),
        torch.randn(2, 4, 1, 7, device=device).expand(2, 4, 5, 7),
    )
    for view in views:
        maps = view.to(dtype)
        if view.stride(1) == 0 or view.stride(2) == 0:
            maps = view.to(dtype)[:, :1, :1].expand_as(view)
        before = maps.clone()
        found = sf.upsampled_labels(maps, (13, 29), backend=backend)
        assert_best(found, maps, (13, 29))
        dense = sf.upsampled_labels(before, (13, 29), backend=backend)
        assert all(map(torch.equal, found, dense)) and torch.equal(maps, before)


@pytest.mark.parametrize("size", [(50, 90), (20, 30), (7, 5), (31, 41)], ids=str)
@pytest.mark.parametrize("workspace", [1, 5000, 40_000, 2**20])
def test_bands_have_the_bits_of_the_whole(size, workspace, monkeypatch):
    """Bands of rows and of classes, of any size, give the same bits and the first of ties."""
    maps = torch.randn(2, 9, 31, 41)
    maps[:, 4:8] = maps[:, :4]
    whole = sf.upsampled_labels(maps, size, backend="torch")
    monkeypatch.setattr(tiles, "WORKSPACE_BYTES", workspace)
    assert all(map(torch.equal, sf.upsampled_labels(maps, size, backend="torch"), whole))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinities_of_one_class(run):
    device, backend = run
    maps = torch.zeros(3, 4, 4, device=device)
    maps[1], maps[2] = torch.inf, -torch.inf
    labels, values = sf.upsampled_labels(maps, (6, 6), backend=backend)  # no weight is 0 inside
    assert (labels[2:4, 2:4] == 1).all() and (values[2:4, 2:4] == torch.inf).all()


def test_constants_for_autograd(run):
    device, backend = run
    maps = torch.randn(3, 4, 4, device=device, requires_grad=True)
    labels, values = sf.upsampled_labels(maps, (6, 6), backend=backend)
    assert not labels.requires_grad and not values.requires_grad


def test_empty_batch(run):
    device, backend = run
    maps = torch.zeros(0, 3, 4, 4, device=device)
    for found in sf.upsampled_labels(maps, (6, 5), backend=backend):
        assert found.shape == (0, 6, 5)


@pytest.mark.parametrize(
    "size", [(5,), 5, "58", None, (5, 8.0), (5, True), (0, 8), (5, -1), (Fraction(5), 8), (1, 2, 3)]
)
def test_bad_sizes(size):
    with pytest.raises(ValueError, match=r"size must be .*\(H, W\).* got"):
        sf.upsampled_labels(torch.zeros(2, 3, 3), size)


def test_bad_maps():
    with pytest.raises(TypeError, match=r"maps must have a floating dtype .*int64"):
        sf.upsampled_labels(torch.zeros(2, 3, 3, dtype=torch.int64), (4, 4))
    with pytest.raises(TypeError, match=r"maps must be a torch\.Tensor, got list"):
        sf.upsampled_labels([[[1.0]]], (4, 4))
    for shape in ((3, 3), (3,), (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match=r"maps must be \(C, h, w\) or \(B, C, h, w\), got"):
            sf.upsampled_labels(torch.zeros(shape), (4, 4))
    for shape in ((0, 3, 3), (2, 0, 3), (1, 2, 3, 0)):
        with pytest.raises(ValueError, match=r"maps .*must not be empty"):
            sf.upsampled_labels(torch.zeros(shape), (4, 4))
    with pytest.raises(ValueError, match="not float64"):
        sf.upsampled_labels(torch.zeros(2, 3, 3).double(), (4, 4), backend="triton")


def test_meta_tensors():
    labels, values = sf.upsampled_labels(torch.zeros(300, 3, 3, device="meta").half(), (4, 5))
    assert (labels.shape, labels.dtype) == ((4, 5), torch.int16)
    assert (values.shape, values.dtype) == ((4, 5), torch.float32)
