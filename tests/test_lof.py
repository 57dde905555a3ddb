import pytest
import torch
from cases import FEATURES, RUNS, runs_and_shapes, runs_with
from published_lof import lof as published_lof
from sklearn.neighbors import LocalOutlierFactor
from tolerance import decided, relative_error

import scclip_fast as sf
from scclip_fast import reference


def check_scores(x, k, variant, device, backend, expected=None):
    """Asserts that scores are float64's wherever no tie between neighbours can change them."""
    scores = sf.lof_scores(x.to(device), k, variant=variant, backend=backend)
    d2, neighbors = reference.knn(x.double(), k)
    if expected is None and variant == "scclip":
        expected = reference.simplified_lof(d2[..., -1], neighbors)
    elif expected is None:
        expected = reference.breunig_lof(d2.sqrt(), neighbors)
    sure = decided(sf.knn(x.to(device), k, backend=backend)[1], x=x)
    assert sure.double().mean() > 0.8, (
        f"only {sure.double().mean():.0%} of the tokens are free of ties"
    )
    assert relative_error(scores.cpu()[sure], expected[sure]) < 1e-5
    assert scores.isfinite().all() and scores.shape == expected.shape
    return scores, sure


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "device, backend, b, n, d, dtype",
    # The neighbours of larger ones are in test_knn; what is left depends on N alone.
    runs_and_shapes(least_tokens=31, interpreted=lambda b, n, d: n <= 33 and b * d <= 64),
)
@pytest.mark.parametrize("variant", ["scclip", "breunig"])
def test_shapes(device, backend, b, n, d, dtype, variant):
    x = torch.randn(b, n, d, dtype=torch.float64).to(dtype)
    if d == 1 or (
        d == 3 and dtype == torch.bfloat16
    ):  # a coarse line or grid of points: nothing but ties
        assert sf.lof_scores(x.to(device), variant=variant, backend=backend).shape == (b, n)
    else:
        check_scores(x, 30, variant, device, backend)


@pytest.mark.parametrize(
    "device, backend, kind, shape", runs_with(FEATURES, [(200, 64), (196, 768)])
)
def test_equals_the_published_equation(device, backend, kind, shape):
    """The rank of the threshold is not whole at these N, so that rounding decides no outlier."""
    n, d = shape
    x = FEATURES[kind](1, n, d)
    expected_indices, expected = published_lof(x[0].double())
    scores, sure = check_scores(x, 30, "scclip", device, backend, expected[None])
    indices, again = sf.lof(x[0].to(device), backend=backend)
    assert torch.equal(again, scores[0])
    assert indices.dtype == torch.int64 and indices.dim() == 1
    if sure.all():
        assert indices.tolist() == expected_indices.tolist()
    assert len(set(indices.tolist()) ^ set(expected_indices.tolist())) <= 2 * (~sure).sum()


@pytest.mark.parametrize("device, backend, kind, k", runs_with(FEATURES, [1, 5, 30]))
def test_breunig_equals_scikit_learn(device, backend, kind, k):
    x = FEATURES[kind](1, 196, 32)
    theirs = LocalOutlierFactor(n_neighbors=k, algorithm="brute", metric="euclidean").fit(
        x[0].double().numpy()
    )
    check_scores(
        x, k, "breunig", device, backend, -torch.from_numpy(theirs.negative_outlier_factor_)[None]
    )
    distances, _ = sf.knn(x[0].to(device), k, backend=backend)
    their_distances, _ = theirs.kneighbors()
    assert relative_error(distances.sqrt(), torch.from_numpy(their_distances)) < 1e-5
    assert relative_error(distances[:, -1].sqrt(), torch.from_numpy(their_distances[:, -1])) < 1e-5


@pytest.mark.parametrize("device, backend", RUNS)
def test_batch(device, backend):
    x = torch.randn(3, 100, 16, device=device)
    indices, scores = sf.lof(x, backend=backend)
    alone = [sf.lof(image, backend=backend) for image in x]
    assert torch.equal(scores, torch.stack([s for _, s in alone]))
    expected = [[i, token] for i, (found, _) in enumerate(alone) for token in found.tolist()]
    assert indices.tolist() == expected and indices.shape == (15, 2)


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("variant", ["scclip", "breunig"])
class TestDegenerate:
    def test_all_tokens_equal(self, device, backend, variant):
        x = torch.randn(1, 1, 64, device=device).expand(2, 100, 64) * 1000
        indices, scores = sf.lof(x, variant=variant, backend=backend)
        assert torch.equal(scores, torch.ones_like(scores)) and indices.shape == (0, 2)

    def test_many_exact_duplicates(self, device, backend, variant):
        """Equal tokens score 1, and the cloud far from them scores as without them."""
        x = torch.randn(100, 16)
        x[:40] = 30 + x[:1]
        scores = sf.lof_scores(x.to(device), variant=variant, backend=backend)
        assert scores.isfinite().all()
        assert torch.equal(scores[:40], torch.ones_like(scores[:40]))
        expected = sf.lof_scores(x[40:].to(device), variant=variant, backend=backend)
        assert torch.allclose(scores[40:], expected, rtol=1e-5)

    def test_tokens_that_are_not_finite(self, device, backend, variant):
        x = torch.randn(2, 100, 16, device=device)
        expected = sf.lof(x[:, 3:], variant=variant, backend=backend)
        x[:, 0, 0], x[:, 1, 3], x[:, 2] = torch.nan, torch.inf, -torch.inf
        indices, scores = sf.lof(x, variant=variant, backend=backend)
        assert scores[:, :3].isnan().all()
        assert torch.allclose(scores[:, 3:], expected[1], rtol=1e-5)
        assert torch.equal(indices - torch.tensor([0, 3], device=device), expected[0])
        with pytest.raises(ValueError, match=r"6 token.* first is token 0 of image 0"):
            sf.lof(x, variant=variant, backend=backend, check_finite=True)
        only = sf.lof_scores(x[:, :33], variant=variant, backend=backend)
        assert only.isnan().all()  # 29 finite others for 30 neighbours

    def test_empty_batch(self, device, backend, variant):
        indices, scores = sf.lof(
            torch.empty(0, 50, 4, device=device), variant=variant, backend=backend
        )
        assert indices.shape == (0, 2) and scores.shape == (0, 50)

    def test_no_gradient(self, device, backend, variant):
        x = torch.randn(40, 4, device=device, requires_grad=True)
        _, scores = sf.lof(x, variant=variant, backend=backend)
        assert not scores.requires_grad and scores.grad_fn is None

    def test_far_from_the_origin_and_any_scale(self, device, backend, variant):
        """Centred distances lose no digits to an offset, and a power of two changes no bit."""
        x = (torch.randn(100, 16, device=device) * 256).round() / 256
        expected = sf.lof_scores(x, variant=variant, backend=backend)
        assert torch.allclose(
            sf.lof_scores(x + 1024, variant=variant, backend=backend), expected, rtol=1e-4
        )
        if variant == "scclip":  # breunig adds scikit-learn's 1e-10 to a distance
            for scale in (2.0**-30, 2.0**30):
                assert torch.equal(
                    sf.lof_scores(x * scale, variant=variant, backend=backend), expected
                )


@pytest.mark.parametrize(
    "device, backend, variant, far", runs_with(["scclip", "breunig"], [1e4, 1e8, 1e18, 1e20, 3e38])
)
def test_a_giant_token_hides_no_other(device, backend, variant, far):
    """A floor of the k-distances that is a share of the largest would hide all other outliers."""
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    x[1] = torch.tensor([40.0, 0])
    x[0] = torch.tensor([far, 0])
    indices, scores = sf.lof(x.to(device), 10, 0.02, variant=variant, backend=backend)
    expected = sf.lof(x.double(), 10, 0.02, variant=variant, backend="reference")[0]
    assert indices.tolist() == expected.tolist() and len(indices) == 6
    assert scores.argmax() == 0 and scores.isfinite().all()
    assert sf.lof(x.to(device), 10, 0.02, backend=backend, check_finite=True)[0].tolist()[0] == 0


@pytest.mark.parametrize("device, backend", RUNS)
def test_a_heap_of_duplicates_hides_no_outlier(device, backend):
    """The k-distance 0 of a heap must not make the tokens beside it outliers."""
    planted = torch.tensor([5.0, 31, 47, 70, 90])
    x = torch.cat([torch.full((10,), 0.1), torch.linspace(0.1, 0.2, 30), planted])[:, None]
    indices, scores = sf.lof(x.to(device), 5, 0.1, backend=backend)
    assert indices.tolist() == [40, 41, 42, 43, 44]
    assert (scores[:11] == 1).all()
    expected = sf.lof_scores(x.double(), 5, backend="reference")
    assert torch.allclose(scores.cpu().double(), expected, rtol=1e-3)
