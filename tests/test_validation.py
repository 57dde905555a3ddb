"""Errors for bad arguments name the argument, the value given and the values allowed."""

from fractions import Fraction

import pytest
import torch

import scclip_fast as sf

X = torch.randn(2, 40, 8)
MASK = torch.zeros(2, 40, dtype=torch.bool)
Q = torch.randn(2, 3, 40, 4)

#: ops as functions of one tensor of tokens, by the name of this argument (spaces make names differ)
TOKEN_OPS = {
    "x": lambda x: sf.knn(x, 5),
    "features": lambda x: sf.lof(x, 5),
    "features ": lambda x: sf.lof_scores(x, 5),
    "features  ": lambda x: sf.similarity(x),
    "features      ": lambda x: sf.norm_scores(x),
    "tokens": lambda x: sf.repair(x, MASK, (5, 8)),
    "values": lambda x: sf.aggregate(x, X),
    "features   ": lambda x: sf.aggregate(X, x),
    "features    ": lambda x: sf.adaptive_aggregate(x, X @ X.mT),
    "similarity_matrix": lambda x: sf.adaptive_aggregate(X, x),
    "features     ": lambda x: sf.blended_attention(Q, Q, Q, x),
    "values ": lambda x: sf.content_attention(x, X),
    "features       ": lambda x: sf.content_attention(X, x),
}


@pytest.mark.parametrize("name, op", TOKEN_OPS.items())
class TestTokens:
    def test_integers(self, name, op):
        with pytest.raises(TypeError, match=rf"{name.strip()} must have a floating dtype .*int64"):
            op(torch.ones(2, 40, 8, dtype=torch.int64))

    def test_no_tensor(self, name, op):
        with pytest.raises(TypeError, match=rf"{name.strip()} must be a torch.Tensor, got list"):
            op([[1.0, 2.0]])

    @pytest.mark.parametrize("shape", [(), (8,), (2, 3, 40, 8)])
    def test_rank(self, name, op, shape):
        with pytest.raises(
            ValueError, match=rf"{name.strip()} must be \(N, D\) or \(B, N, D\), got shape"
        ):
            op(torch.randn(shape))

    @pytest.mark.parametrize("shape", [(2, 0, 8), (2, 40, 0), (0, 8)])
    def test_empty_beyond_the_batch(self, name, op, shape):
        with pytest.raises(ValueError, match=rf"{name.strip()} .*must not be empty"):
            op(torch.randn(shape))


SEQUENCE_FIRST = {
    "knn": lambda x: sf.knn(x, 1),
    "lof_scores": lambda x: sf.lof_scores(x, 1),
    "lof": lambda x: sf.lof(x, 1),
    "norm_scores": sf.norm_scores,
    "similarity": sf.similarity,
    "aggregate": lambda x: sf.aggregate(x, x),
    "adaptive_aggregate": lambda x: sf.adaptive_aggregate(x, x @ x.mT),
    "blended_attention": lambda x: sf.blended_attention(*[x[:, None]] * 3, x),
    "content_attention": lambda x: sf.content_attention(x, x),
}


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("name", SEQUENCE_FIRST)
def test_a_batch_of_single_tokens(name, backend):
    """The batch is refused as a sequence-first image. One image of a single token is allowed."""
    op = SEQUENCE_FIRST[name]
    with sf.backend(backend):
        for shape in ((3, 1, 8), (196, 1, 8), (2, 1, 1)):
            message = (
                rf"more than one token .*{shape[0]}, 1, {shape[2]}.* batch first.*transpose\(0, 1\)"
            )
            with pytest.raises(ValueError, match=message):
                op(torch.randn(shape))
        op(
            torch.randn(1, 1, 8)
            if name not in ("knn", "lof", "lof_scores")
            else torch.randn(1, 2, 8)
        )


def test_repair_of_single_tokens():
    """A batch of single tokens is allowed here, because the grid confirms one patch an image."""
    x = torch.randn(3, 1, 8)
    assert torch.equal(sf.repair(x, torch.ones(3, 1, dtype=torch.bool), (1, 1)), x)
    with pytest.raises(ValueError, match="grid must be"):
        sf.repair(x, torch.ones(3, 1, dtype=torch.bool), (3, 1))


@pytest.mark.parametrize("op", [sf.lof, sf.lof_scores])
def test_too_few_tokens(op):
    with pytest.raises(ValueError, match="n_neighbors=30 with N=30 tokens"):
        op(torch.randn(30, 4))
    with pytest.raises(ValueError, match="k=40 with N=40 tokens"):
        sf.knn(X, 40)


@pytest.mark.parametrize(
    "k, error", [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_neighbor_count(k, error):
    with pytest.raises(error, match="k must be"):
        sf.knn(X, k)
    with pytest.raises(error, match="n_neighbors must be"):
        sf.lof(X, k)


@pytest.mark.parametrize("value", [0, -0.1, 0.51, 1, float("nan"), float("inf")])
def test_contamination(value):
    for call in (lambda: sf.outlier_mask(X[0], value), lambda: sf.lof(X, 5, value)):
        with pytest.raises(ValueError, match="contamination must be"):
            call()
    with pytest.raises(TypeError, match="contamination must be a number, got str"):
        sf.lof(X, 5, "0.05")


def test_variant():
    with pytest.raises(ValueError, match="variant must be one of scclip, breunig, got 'textbook'"):
        sf.lof(X, 5, variant="textbook")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers(value):
    for call, name in (
        (lambda: sf.aggregate(X, X, value), "beta"),
        (lambda: sf.similarity(X, value), "beta"),
        (lambda: sf.blended_attention(Q, Q, Q, X, gamma=value), "gamma"),
        (lambda: sf.content_attention(X, X, value), "gamma"),
        (lambda: sf.content_attention(X, X, threshold=value), "threshold"),
        (lambda: sf.content_attention(X, X, threshold=("mean", value)), "threshold"),
        (lambda: sf.blended_attention(Q, Q, Q, X, alpha=value), "alpha"),
        (lambda: sf.blended_attention(Q, Q, Q, X, scale=value), "scale"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a finite number"):
            call()
    with pytest.raises(ValueError, match=r"alpha must be a finite number in \[0, 1\], got 1.5"):
        sf.blended_attention(Q, Q, Q, X, alpha=1.5)
    with pytest.raises(ValueError, match="gamma must be"):
        sf.blended_attention(Q, Q, Q, X, gamma=-1)
    with pytest.raises(TypeError, match="beta must be a number, got str"):
        sf.similarity(X, "-inf")


@pytest.mark.parametrize("value", [("max", 1.2), ("mean",), ("mean", 1.0, 2.0), ()])
def test_threshold(value):
    with pytest.raises(ValueError, match=r'threshold must be None, a number or \("mean", number\)'):
        sf.content_attention(X, X, threshold=value)


@pytest.mark.parametrize("value", ["mean", [0.4], ("mean", None), True])
def test_threshold_of_another_type(value):
    with pytest.raises(TypeError, match="threshold must be a number, got"):
        sf.content_attention(X, X, threshold=value)


def test_repair():
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, .* got torch.int64"):
        sf.repair(X, MASK.long(), (5, 8))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 40\)"):
        sf.repair(X, MASK[:1], (5, 8))
    for grid in ((5, 9), (-5, -8), (5.0, 8.0), (Fraction(5, 2), 16), (None, 4), "58", (40,), 40):
        with pytest.raises(ValueError, match="grid must be"):
            sf.repair(X, MASK, grid)


def test_shapes_that_do_not_fit():
    with pytest.raises(
        ValueError,
        match=r"features must have shape \(2, 40, 8\) for the tokens of values, got \(2, 39, 8\)",
    ):
        sf.aggregate(X, X[:, 1:])
    with pytest.raises(ValueError, match="either all tensors or none must have a batch dimension"):
        sf.aggregate(X, X[0])
    with pytest.raises(ValueError, match=r"similarity_matrix must have shape \(2, 40, 40\)"):
        sf.adaptive_aggregate(X, X)
    with pytest.raises(ValueError, match="k must have shape"):
        sf.blended_attention(Q, Q[..., 1:], Q, X)
    with pytest.raises(ValueError, match="v must have shape"):
        sf.blended_attention(Q, Q, Q[:, :, 1:], X)
    with pytest.raises(ValueError, match="features must have shape"):
        sf.blended_attention(Q, Q, Q, X[:, 1:])
    with pytest.raises(ValueError, match=r"features must be \(N, D\) for q \(H, N, d\)"):
        sf.blended_attention(Q, Q, Q, X[0])
    with pytest.raises(ValueError, match=r"q must be \(H, N, d\) or \(B, H, N, d\)"):
        sf.blended_attention(X[0], X[0], X[0], X[0])
    with pytest.raises(TypeError, match="q, k and v must have one dtype"):
        sf.blended_attention(Q, Q, Q.half(), X)


def test_mismatched_devices():
    meta = X.to("meta")
    for call in (
        lambda: sf.aggregate(X, meta),
        lambda: sf.repair(X, MASK.to("meta"), (5, 8)),
        lambda: sf.adaptive_aggregate(X, torch.empty(2, 40, 40, device="meta")),
        lambda: sf.blended_attention(Q, Q, Q, meta),
    ):
        with pytest.raises(ValueError, match=r"one device, got .* on cpu, .* on meta"):
            call()


def test_check_finite_names_the_first():
    x = X.clone()
    x[1, 7, 3], x[1, 9, 0] = torch.inf, torch.nan
    for op in (sf.knn, sf.lof, sf.lof_scores):
        with pytest.raises(ValueError, match=r"2 token.* the first is token 7 of image 1"):
            op(x, 5, check_finite=True)
        op(X, 5, check_finite=True)


def test_meta_tensors():
    x, q = X.to("meta"), Q.to("meta")
    distances, indices = sf.knn(x, 5)
    assert (distances.shape, distances.dtype) == ((2, 40, 5), torch.float32)
    assert (indices.shape, indices.dtype) == ((2, 40, 5), torch.int64)
    assert sf.lof_scores(x, 5).shape == sf.norm_scores(x).shape == (2, 40)
    assert sf.outlier_mask(x[..., 0]).shape == (2, 40)
    assert sf.aggregate(x.half(), x).dtype == torch.float16
    assert sf.repair(x, MASK.to("meta"), (5, 8)).shape == x.shape
    assert sf.blended_attention(q, q, q, x).shape == q.shape
    assert sf.content_attention(x.half(), x, threshold=0.1).dtype == torch.float16
