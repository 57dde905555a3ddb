"""Properties that hold for any tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scclip_fast as sf

settings.register_profile("scclip_fast", deadline=None, max_examples=40)
settings.load_profile("scclip_fast")


@st.composite
def tokens(draw):
    """Tokens (N, D) of multiples of 1/64, on which arithmetic is exact. Duplicates happen."""
    n, d = draw(st.integers(7, 40)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([1, 8, 256]))
    return torch.randint(-spread, spread + 1, (n, d), generator=generator, dtype=torch.float64) / 64


variants = st.sampled_from(["scclip", "breunig"])
backends = st.sampled_from(["torch", "reference"])


def sorted_k_distances(x, k, backend):
    return sf.knn(x, k, backend=backend)[0]


@given(tokens(), st.integers(1, 6), backends, st.randoms(use_true_random=False))
def test_permuted_tokens_have_permuted_distances(x, k, backend, random):
    order = torch.tensor(random.sample(range(len(x)), len(x)))
    expected = sorted_k_distances(x, k, backend)
    assert torch.allclose(sorted_k_distances(x[order], k, backend), expected[order])


@given(st.integers(0, 2**31), st.integers(1, 6), variants, backends)
def test_permuted_tokens_have_permuted_scores(seed, k, variant, backend):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)  # ties would go by index
    order = torch.randperm(30, generator=generator)
    expected = sf.lof_scores(x, k, variant=variant, backend=backend)
    assert torch.allclose(
        sf.lof_scores(x[order], k, variant=variant, backend=backend), expected[order]
    )


@given(tokens(), st.integers(1, 6), variants, st.integers(-1000, 1000))
def test_translation_changes_nothing(x, k, variant, offset):
    moved = x + offset
    assert torch.allclose(sf.knn(moved, k)[0], sf.knn(x, k)[0])
    if (
        len(x.unique(dim=0)) == len(x)
        and len(torch.pdist(x).unique()) == len(x) * (len(x) - 1) // 2
    ):
        scores = (sf.lof_scores(t, k, variant=variant) for t in (moved, x))
        assert torch.allclose(*scores)


@given(tokens(), st.integers(1, 6), st.integers(-10, 10), backends)
def test_scaling_squares_distances_and_leaves_lof(x, k, exponent, backend):
    scale = 2.0**exponent
    distances, indices = sf.knn(x, k, backend=backend)
    scaled, same = sf.knn(x * scale, k, backend=backend)
    assert torch.equal(scaled, distances * scale**2) and torch.equal(same, indices)
    expected = sf.lof_scores(x, k, backend=backend)
    assert torch.allclose(sf.lof_scores(x * scale, k, backend=backend), expected)


@given(tokens(), st.integers(1, 6), variants, backends)
def test_scores_are_positive_and_finite(x, k, variant, backend):
    scores = sf.lof_scores(x, k, variant=variant, backend=backend)
    assert scores.isfinite().all() and (scores > 0).all()


@given(tokens(), st.floats(0.01, 0.5))
def test_at_most_the_share_of_outliers(x, contamination):
    mask = sf.outlier_mask(x[:, 0], contamination)
    assert mask.sum() <= contamination * (len(x) - 1) + 1


@given(tokens(), st.floats(-1, 0.9))
def test_aggregation_of_a_constant_is_the_constant(x, beta):
    """Weights sum to one, except for the 1e-6 in the denominator."""
    weight = sf.similarity(x, beta).sum(dim=-1)
    out = sf.aggregate(torch.ones(len(x), 2, dtype=x.dtype), x, beta)
    assert torch.allclose(out, (weight / (weight + 1e-6))[:, None].expand_as(out), rtol=1e-6)


@given(tokens(), st.floats(0, 1), st.floats(0, 20))
def test_attention_stays_within_the_values(x, alpha, gamma):
    q = x[None]
    out = sf.blended_attention(q, q, q, x + 1e-3, gamma=gamma, alpha=alpha)
    low, high = q.amin(dim=1, keepdim=True), q.amax(dim=1, keepdim=True)
    assert (out >= low - 1e-9).all() and (out <= high + 1e-9).all()
