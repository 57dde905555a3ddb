"""Tests the half-precision search: its certificate, and the rows without one."""

import pytest
import torch
from cases import FEATURES, GPU, clusters
from tolerance import assert_neighbors

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.kernels import knn
from scclip_fast.kernels._launch import Architecture, architecture
from scclip_fast.kernels.knn_details.bins import bins_launch
from scclip_fast.kernels.knn_details.certify import certify_launch
from scclip_fast.kernels.knn_details.panel import panel_launch
from scclip_fast.kernels.knn_details.select import select_launch
from scclip_fast.kernels.knn_details.table import Rounded, Searched, Undecided, positions

DEVICE = "cuda" if GPU else "cpu"
K = 30


def flat(b, n, d):
    """Features of which a third differ by less than fp16 resolves."""
    x = torch.randn(b, n, d)
    x[:, : n // 3] = 3 + 1e-5 * torch.randn(b, n // 3, d)
    return x


def giants(b, n, d):
    """Features with a few tokens whose norm is a thousand times the others'."""
    x = torch.randn(b, n, d)
    x[:, ::60] *= 1000
    return x


KINDS = FEATURES | {"flat": flat, "giants": giants}


@pytest.fixture(params=["panel", "bins"])
def chain(request, monkeypatch):
    """Runs the chain over a panel or over bins, whatever the number of columns."""
    if request.param == "bins":
        monkeypatch.setattr(knn, "MOST_COLUMNS_OF_PANEL", 0)
    return request.param


@pytest.fixture
def half(chain, monkeypatch):
    """Runs a half-precision chain on short inputs too.

    Returns a list of the number of rows that each pass leaves to the search.
    """
    monkeypatch.setattr(knn, "LEAST_TOKENS_FOR_HALF", 1)
    n_left = []
    search = knn._search

    def counting(rows, columns, exclude_self, indices, distances, searched=None):
        if searched is not None:
            n_left.extend(searched.n_tokens.tolist())
        return search(rows, columns, exclude_self, indices, distances, searched)

    monkeypatch.setattr(knn, "_search", counting)
    return n_left


def table_of(x, k, chain):
    """The certificate's table (N, 64) of one image, and its undecided tokens."""
    x = x[None].float().to(DEVICE)
    n = x.shape[1]
    order = positions(n)
    if chain == "panel":
        ((_, _, table, lists),) = knn.by_panel(x, x, True, k)
        listed = []
    else:
        multiple = knn.multiple_of_bins(4, x.shape[2], architecture(x.device))
        halves = knn.rounded(x, x, True, multiple)
        table, lists = knn.decide(*halves, True, 4, 0, n, k)
        listed = lists.positions[0, : lists.n_positions.item()].tolist()
    unbounded = lists.tokens[0, : lists.n_tokens.item()].tolist()
    left = [order.tolist().index(row) for row in listed] + unbounded
    return table[0].cpu()[order], torch.tensor(left).long()


def check_table(entries, true):
    """Asserts that a row has all neighbours, and sure columns are some; returns their number."""
    entries = entries[entries >= 0]
    columns, sure = entries & (2**30 - 1), entries >= 2**30
    assert set(true.tolist()) <= set(columns.tolist())
    assert set(columns[sure].tolist()) <= set(true.tolist())
    assert len(columns.unique()) == len(columns)
    return sure.sum().item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_certificate_holds(kind, chain):
    """The table holds all neighbours of float64, and every sure column is one of them."""
    x = KINDS[kind](1, 350, 72)[0]
    table, undecided = table_of(x, K, chain)
    true = reference.knn(x.double()[None], K)[1][0]
    decided = torch.ones(len(x), dtype=torch.bool)
    decided[undecided] = False
    # The third of the tokens that fp16 does not resolve may be undecided, and a few of the others.
    assert decided.float().mean() > (0.6 if kind == "flat" else 0.9)
    sure = sum(check_table(table[row], true[row]) for row in decided.nonzero()[:, 0])
    assert sure > 15 * decided.sum()  # most candidates need not be measured


@pytest.mark.slow
def test_the_certificate_holds_at_the_size_of_a_trunk(chain, first=2560, rows=128):
    """Checks 128 rows of 5184 x 1024, the shape of SAM3's trunk."""
    x = clusters(1, 5184, 1024)[0].to(DEVICE)
    n = len(x)
    if chain == "panel":  # of these rows alone, as queries; the diagonal is then left out
        halves = knn.rounded(x[None], x[None], True, 128)
        panel = x.new_empty(1, rows, halves[1].padded_n, dtype=torch.float16)
        table = torch.empty(1, rows, 64, dtype=torch.int32, device=DEVICE)
        searched = Searched(torch.empty_like(table[..., 0]), torch.zeros_like(table[:, 0, 0]))
        panel_launch(*halves, False, panel, first, 64).run()
        panel[0, :, first : first + rows].fill_diagonal_(torch.inf)
        select_launch(panel, *halves, table, searched, first, K).run()
        left = positions(n)[searched.tokens[0, : searched.n_tokens.item()].cpu().long()].tolist()
    else:
        shares, halves = knn.rounded_for_bins(x[None], x[None], True)
        table, undecided = knn.decide(*halves, True, shares, first, rows, K)
        left = undecided.positions[0, : undecided.n_positions.item()].tolist()
        assert not undecided.n_tokens.item()
    assert len(left) < rows
    token_at = positions(n).argsort()[first : first + rows].to(DEVICE)
    d2 = torch.cdist(x[token_at].double(), x.double()).square()
    true = d2.scatter(1, token_at[:, None], torch.inf).topk(K, largest=False).indices.cpu()
    for row in set(range(rows)) - {position - first for position in left}:
        check_table(table[0, row].cpu(), true[row])


def test_data_that_fp16_cannot_hold_are_measured(half, chain):
    """Each row has 99 candidates in two clusters of 100, finer than the step of fp16."""
    x = torch.randn(1, 200, 8) * 1e-7
    x[:, ::2] += 1
    _, undecided = table_of(x[0], 9, chain)
    assert len(undecided) == 200
    _, indices = sf.knn(x.to(DEVICE), 9, backend="triton")
    assert half == [200]
    assert_neighbors(indices, x=x, k=9)


@pytest.mark.usefixtures("poisoned", "half")
@pytest.mark.parametrize("kind", KINDS)
def test_neighbours(kind):
    x = KINDS[kind](1, 250, 40)
    distances, indices = sf.knn(x.to(DEVICE), K, backend="triton")
    assert_neighbors(indices, x=x, k=K)
    expected = reference.squared_distances(x.double()).gather(-1, indices.cpu())
    assert torch.allclose(distances.cpu().double(), expected, rtol=2e-6, atol=1e-30)
    assert (distances.diff(dim=-1) >= 0).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "b, n, d, k",
    [
        pytest.param(64, 196, 5, 30, marks=pytest.mark.slow),
        (1, 441, 24, 48),
        (2, 128, 17, 1),
        (3, 130, 9, 48),
        (1, 1200, 16, 30),
    ],
)
def test_panels(b, n, d, k, monkeypatch):
    """Images of up to a few thousand tokens take a panel, and all images one pass."""
    passes, choose = [], knn.choose
    monkeypatch.setattr(knn, "choose", lambda *args: passes.append(args) or choose(*args))
    x = clusters(b, n, d)
    _, indices = sf.knn(x.to(DEVICE), k, backend="triton")
    assert_neighbors(indices, x=x, k=k)
    assert len(passes) == 1


def test_an_image_of_a_batch_of_64():
    """One image of 196 x 768 takes the same kernels and tiles as 64 of them."""
    x = clusters(1, 196, 768)
    _, indices = sf.knn(x.to(DEVICE), K, backend="triton")
    assert_neighbors(indices[0], x=x[0], k=K, tie=1e-5)


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types_and_strides(dtype):
    x = torch.randn(1, 70, 2, 180, device=DEVICE).to(dtype)[:, :, 1, ::2].transpose(1, 2)
    assert not x.is_contiguous()
    found = sf.lof_scores(x, 9, backend="triton")
    expected = sf.lof_scores(x.double(), 9, backend="reference")
    assert torch.allclose(found.double(), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="a GPU has tiles of its own")
@pytest.mark.parametrize("width", [20, 160, 300])
def test_tiles_for_hopper(width, monkeypatch):
    """A step of `bins` has 128 columns beside rows that are held, and 256 with more channels."""
    monkeypatch.setattr(knn, "MOST_COLUMNS_OF_PANEL", 0)
    monkeypatch.setattr(knn, "architecture", lambda device: Architecture(90, 227 * 1024))
    x = torch.randn(1, 1030, width)
    _, indices = sf.knn(x, 5, backend="triton")
    assert_neighbors(indices, x=x, k=5)


@pytest.mark.parametrize(
    "blocks, most, shares, multiprocessors, expected",
    [
        (648, 170, 3, 132, 132),  # 396 programs, three on each
        (648, 170, 4, 108, 162),
        (41, 170, 3, 132, 41),
        (50, 30, 3, 132, 30),  # no wave fits
        (50, 0, 3, 132, 1),
    ],
)
def test_passes_fill_whole_waves(blocks, most, shares, multiprocessors, expected):
    gpu = Architecture(90, 227 * 1024, multiprocessors)
    assert knn.blocks_of_a_pass(blocks, most, shares, gpu) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("width", [20, 160, 300])
def test_many_tokens_on_the_gpu(width):
    x = torch.randn(2, 1500, width)
    _, indices = sf.knn(x.cuda(), K, backend="triton")
    assert_neighbors(indices, x=x, k=K)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 5184, 1024), (64, 196, 768)])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_people_have(shape, kind):
    """The kernels agree with the torch path except for ties, of which images have few."""
    x = KINDS[kind](*shape).cuda()
    found, expected = (sf.knn(x, K, backend=backend) for backend in ("triton", "torch"))
    same = found[1].sort(dim=-1).values == expected[1].sort(dim=-1).values
    assert same.all(dim=-1).double().mean() > 0.999
    assert torch.allclose(found[0], expected[0], rtol=1e-5)
    assert_neighbors(found[1][0, :64], x=x[0], k=K, rows=slice(64), tie=1e-5)


@pytest.mark.gpu
def test_a_mask_head_on_the_gpu(shape=(1, 82_944, 256)):
    x = clusters(*shape).cuda()
    distances, indices = sf.knn(x, K, backend="triton")
    rows = slice(0, shape[1], 1000)
    _, d2 = assert_neighbors(indices[0, rows], x=x[0], k=K, rows=rows, tie=1e-5)
    expected = d2.gather(1, indices[0, rows].cpu())
    assert torch.allclose(distances[0, rows].cpu().double(), expected, rtol=1e-5)


def test_tokens_that_are_not_finite(half):
    x = torch.randn(1, 140, 12)
    clean = sf.knn(x[:, 3:].to(DEVICE), 9, backend="triton")[1]
    x[:, 0, 0], x[:, 1, 3], x[:, 2] = torch.nan, torch.inf, -torch.inf
    distances, indices = sf.knn(x.to(DEVICE), 9, backend="triton")
    assert torch.equal(indices[:, 3:] - 3, clean)
    assert distances[:, :3].isinf().all() and distances[:, 3:].isfinite().all()
    assert half == [0, 3]


def test_passes_and_images_agree(half, chain, monkeypatch):
    """Several passes of rows, and images one by one, give the same bits."""
    x = torch.randn(2, 150, 20, device=DEVICE)
    whole = sf.knn(x, 9, backend="triton")
    monkeypatch.setattr(knn, "BINS_BYTES", 1)
    monkeypatch.setattr(knn, "PANEL_BYTES", 1)
    half.clear()
    parts = sf.knn(x, 9, backend="triton")
    # Two images of two blocks of rows, which one panel of an image holds.
    assert len(half) == (4 if chain == "bins" else 2)
    assert all(map(torch.equal, whole, parts))


def test_few_variants_of_a_kernel():
    """A new number of tokens compiles a kernel anew only if it takes another tile."""
    constants = {"panel": set(), "bins": set()}
    for n in (513, 1025, 1500, 2304, 3600, 5184, 10_000, 20_000):
        chain = "panel" if n <= knn.MOST_COLUMNS_OF_PANEL else "bins"
        shares = knn.shares_of_columns(1, n, architecture(torch.device(DEVICE)))
        half = torch.empty(1, shares * 128 * -(-n // (shares * 128)), 1024, device="meta").half()
        square = torch.empty(half.shape[:2], device="meta")
        table = torch.empty(1, half.shape[1], 64, dtype=torch.int32, device="meta")
        tokens = Rounded(half, square, square, square[:, 0], n, 1024)
        if chain == "panel":
            panel = torch.empty(1, *[half.shape[1]] * 2, dtype=torch.float16, device="meta")
            launches = (
                panel_launch(tokens, tokens, True, panel, 0, 64),
                select_launch(panel, tokens, tokens, table, Searched(table, table), 0, 30),
            )
        else:
            bins = table.new_empty(1, half.shape[1], shares, 3, 64)
            launches = (
                bins_launch(tokens, tokens, True, bins, 0, 64),
                certify_launch(bins, tokens, tokens, table, Undecided(*[table] * 6), 0, 30),
            )
        constants[chain] |= {
            (launch.kernel, *sorted(launch.constants.items())) for launch in launches
        }
    assert len(constants["panel"]) == 2 and len(constants["bins"]) <= 3
