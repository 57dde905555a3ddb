import pytest
import torch
from cases import FEATURES, RUNS, runs_and_shapes
from tolerance import assert_close, assert_neighbors

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.chunked import search, tiles


def check(x, k, device, backend):
    distances, indices = sf.knn(x.to(device), k, backend=backend)
    assert_neighbors(indices, x=x, k=k)
    d2 = reference.squared_distances(x.double())
    assert_close(distances, ref=d2.gather(-1, indices.cpu()))
    assert (distances.diff(dim=-1) >= 0).all()
    return distances, indices


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device, backend, b, n, d, dtype", runs_and_shapes(least_tokens=2))
def test_shapes(device, backend, b, n, d, dtype):
    check(torch.randn(b, n, d, dtype=torch.float64).to(dtype), min(30, n - 1), device, backend)


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 30, 31, 32])
def test_lists_around_powers_of_two(device, backend, k):
    """A list has a capacity of the next power of two."""
    check(torch.randn(1, 33, 7), k, device, backend)


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("k", [63, 64, 65, pytest.param(128, marks=pytest.mark.slow)])
def test_long_lists(device, backend, k):
    check(torch.randn(1, 133, 5), k, device, backend)


@pytest.mark.parametrize(
    "n, k",
    [(577, 129), (577, 400), (577, 576), pytest.param(1100, 1024, marks=pytest.mark.slow)],
)
def test_longer_than_the_kernel_takes(n, k):
    x = torch.randn(1, n, 5)
    check(x, k, "cpu", "torch")
    with pytest.raises(ValueError, match=rf"k must be at most 128 .* got {k}"):
        sf.knn(x, k, backend="triton")
    with sf.backend("triton"):  # unlike the argument, a scope gives way
        assert sf.knn(x, k)[1].shape == (1, n, k)


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("kind", FEATURES)
def test_features(device, backend, kind):
    check(FEATURES[kind](2, 196, 64), 30, device, backend)


@pytest.mark.parametrize("device, backend", RUNS)
def test_ties_go_to_the_lower_index(device, backend):
    x = torch.arange(64.0)[:, None] % 8  # around their mean, 3.5, every product is exact
    distances, indices = sf.knn(x.to(device), 20, backend=backend)
    expected = reference.knn(x[None], 20)
    assert torch.equal(distances.cpu(), expected[0][0])
    assert torch.equal(indices.cpu(), expected[1][0])


@pytest.mark.parametrize("device, backend", RUNS)
def test_duplicates_are_neighbours_at_distance_zero(device, backend):
    x = (1000 + torch.randn(50, 16)).repeat(2, 1)
    distances, indices = sf.knn(x.to(device), 1, backend=backend)
    assert (distances == 0).all()
    assert torch.equal(indices[:, 0].cpu(), (torch.arange(100) + 50) % 100)


@pytest.mark.parametrize("device, backend", RUNS)
def test_strided_input(device, backend):
    base = torch.randn(9, 2, 70, 3, device=device)
    views = (
        base[..., 1].permute(1, 2, 0),
        base[:, :, ::2, 0].permute(1, 2, 0),
        base[0, 0].expand(2, 70, 3),
    )
    for x in views:
        assert not x.is_contiguous()
        found, expected = (sf.knn(t, 5, backend=backend) for t in (x, x.contiguous()))
        assert torch.equal(found[1], expected[1])
        assert torch.allclose(found[0], expected[0], rtol=1e-6)  # loads decide how sums are cut


@pytest.mark.parametrize("device, backend", RUNS)
def test_images_of_a_batch_are_independent(device, backend):
    x = torch.randn(3, 70, 12, device=device)
    together = sf.knn(x, 9, backend=backend)
    alone = [sf.knn(image, 9, backend=backend) for image in x]
    for i in range(2):
        assert torch.equal(together[i], torch.stack([pair[i] for pair in alone]))


@pytest.mark.parametrize("device, backend", RUNS)
def test_tokens_that_are_not_finite_are_nobodys_neighbour(device, backend):
    x = torch.randn(2, 70, 12)
    clean = sf.knn(x[:, 3:].to(device), 9, backend=backend)
    x[:, 0, 0], x[:, 1, 3], x[:, 2] = torch.nan, torch.inf, -torch.inf
    distances, indices = sf.knn(x.to(device), 9, backend=backend)
    assert torch.equal(indices[:, 3:] - 3, clean[1])
    assert torch.allclose(distances[:, 3:], clean[0], rtol=1e-5)
    assert distances[:, :3].isinf().all()
    # Where no finite token is left, it is one, at distance inf, but never of itself.
    distances, indices = sf.knn(x[:, :6].to(device), 5, backend=backend)
    assert torch.equal(
        indices.sort(dim=-1).values[0].cpu(),
        torch.tensor([[j for j in range(6) if j != i] for i in range(6)]),
    )
    assert distances[:, 3:, 2:].isinf().all() and distances[:, 3:, :2].isfinite().all()


@pytest.mark.slow
def test_tiles_agree(monkeypatch):
    """Several tiles, and lists longer than a tile is wide, have the results of one tile."""
    x = torch.randn(3, 300, 24, dtype=torch.float64)
    expected = {k: search.nearest(x, k) for k in (1, 30, 250)}
    for bytes_ in (2**21, 2**17, 2**13):
        monkeypatch.setattr(tiles, "WORKSPACE_BYTES", bytes_)
        for k, whole in expected.items():
            assert all(map(torch.equal, search.nearest(x, k), whole))
    assert tiles.plan(3, 300, 24, x.dtype).columns < 250


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31():
    """Both images of a batch, and rows within one, more than 2^31 elements apart."""
    storage = torch.zeros(2**32 + 2**20, dtype=torch.float16, device="cuda")
    x = storage.as_strided((2, 100, 8), (2**31 + 64, (2**31 - 2**10) // 100, 1))
    x.normal_()
    for backend in ("triton", "torch"):
        found, expected = (sf.knn(t, 9, backend=backend) for t in (x, x.clone()))
        assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])
