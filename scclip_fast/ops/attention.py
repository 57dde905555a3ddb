"""Attention blended from two halves: self attention, and attention to similar features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import chunked, reference
from ..backend import NAMESPACE, operands, resolve
from ..precision import true_float32
from . import _check
from .aggregate import value_and_feature_tokens, weighted_mean

#: None for the mean similarity of the image, a similarity, or ("mean", a multiple of the mean).
Threshold = float | tuple[str, float] | None


@torch.library.custom_op(f"{NAMESPACE}::mean_similarity", mutates_args=())
def _mean_similarity(features: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """`reference.mean_similarity` of features (B, N, D): mu (B,), computed in a dtype."""
    if backend == "triton" and features.numel():
        from ..kernels.mean_similarity import mean_similarity_triton

        return mean_similarity_triton(features)
    return reference.mean_similarity(features.to(dtype))


@_mean_similarity.register_fake
def _(features: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return features.new_empty(features.shape[0], dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
@true_float32
def _attention(
    q: Tensor, k: Tensor, v: Tensor, content: Tensor, alpha: float, scale: float, backend: str
) -> Tensor:
    """`reference.attention`: (1 - alpha) softmax(scale q k^T) v + alpha content, (B, H, N, dv)."""
    if backend == "triton" and v.numel():
        from ..kernels.attention import MAX_WIDTH, attention_triton

        if max(q.shape[-1], v.shape[-1]) <= MAX_WIDTH[q.dtype]:
            return attention_triton(q, k, v, content, alpha, scale)
    if backend == "reference":
        dtype = chunked.compute_dtype(q)
        return reference.attention(
            q.to(dtype), k.to(dtype), v.to(dtype), content.to(dtype), alpha, scale
        ).to(v.dtype)
    return chunked.attention(q, k, v, content, alpha, scale)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, content: Tensor, alpha: float, scale: float, backend: str
) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
@true_float32
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return chunked.attention_backward(grad, q, k, v, scale)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, _, ctx.alpha, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v = ctx.saved_tensors
    grad_q, grad_k, grad_v = _attention_backward(grad * (1 - ctx.alpha), q, k, v, ctx.scale)
    return grad_q, grad_k, grad_v, grad * ctx.alpha, None, None, None


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def blended_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    gamma: float = 3.0,
    alpha: float = 0.5,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """SC-CLIP's attention: self attention blended with attention to similar features.

    out = [(1 - alpha) softmax(scale q k^T) + alpha C] v, where C_ij is the softmax over {j : S_ij
    >= mu} of gamma (S_ij - mu), S the cosine similarity of the features and mu its mean over the
    image. C is the same for all heads. SC-CLIP itself passes its keys as q as well. Differentiable
    by q, k, v and features (once, in reverse mode). The backward pass recomputes both halves in
    chunked torch code. For heads wider than 128 (64 in float32), the Triton backend leaves the self
    half to torch's own attention.

    In the content half, a token whose features are not finite has weight 0 for all others, and mu
    is the mean over pairs of the others; see `aggregate`. Its own row of the result is NaN.

    Args:
        q, k: (H, N, d) or (B, H, N, d), floating, any strides.
        v: (H, N, dv) or (B, H, N, dv), the dtype of q and k.
        features: (N, D) or (B, N, D), floating, unthresholded; its dtype may differ.
        gamma: sharpness of the content half, >= 0.
        alpha: share of the content half, in [0, 1].
        scale: factor of the scores q k^T of the self half; None for 1 / sqrt(d).
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).

    Returns:
        A tensor of the shape and dtype of `v`.

    Raises:
        TypeError: not floating, or q, k and v of different dtypes.
        ValueError: shapes or devices that do not fit, a number out of range, a backend that cannot
            run.
        NotImplementedError: a tangent of forward-mode differentiation.
    """
    queries, keys, values, f = _checked(q, k, v, features)
    _check.no_tangent("blended_attention", queries, keys, values, f)
    gamma = _check.number("gamma", gamma, low=0)
    alpha = _check.number("alpha", alpha, low=0, high=1)
    scale = queries.shape[-1] ** -0.5 if scale is None else _check.number("scale", scale)
    resolved = resolve(backend, queries, f)
    queries, keys, values, f = operands(resolved, queries, keys, values, f)
    needs_gradient = any(t.requires_grad for t in (queries, keys, values, f))
    if resolved == "torch" and not (needs_gradient and torch.is_grad_enabled()):
        return _blended_attention(queries, keys, values, f, gamma, alpha, scale).view_as(v)
    content = _content_attention(values, f, gamma, resolved)
    out = _attention(queries, keys, values, content, alpha, scale, resolved)
    return out.to(v.dtype).view_as(v)


@torch.library.custom_op(f"{NAMESPACE}::blended_attention", mutates_args=())
@true_float32
def _blended_attention(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor, gamma: float, alpha: float, scale: float
) -> Tensor:
    """`blended_attention` on the torch path, without gradients."""
    if v.numel() and chunked.can_blend_weights(v, features):
        return chunked.blended_attention(q, k, v, features, gamma, alpha, scale)
    content = _content_attention(v, features, gamma, "torch")
    return chunked.attention(q, k, v, content, alpha, scale)


@_blended_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor, gamma: float, alpha: float, scale: float
) -> Tensor:
    return v.new_empty(v.shape)


def _content_attention(values: Tensor, features: Tensor, gamma: float, backend: str) -> Tensor:
    """C v (B, H, N, dv), all heads at once by one product of width H dv."""
    merged = values.transpose(1, 2).flatten(2)  # (B, N, H dv)
    out = _attend_to_content(merged, features, gamma, None, backend)
    return out.unflatten(2, (values.shape[1], values.shape[3])).transpose(1, 2)


def content_attention(
    values: Tensor,
    features: Tensor,
    gamma: float = 3.0,
    threshold: Threshold = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention of tokens to those that are alike, without an N x N matrix.

    out_i = sum_j C_ij v_j, where C_ij is the softmax over {j : S_ij >= t} of gamma S_ij and S the
    cosine similarity of the features. It is the content half of `blended_attention`, and the proxy
    attention of ProxyCLIP (Lan et al., arXiv 2408.04883) with the features of another model. RADSeg
    attends with gamma = 10 and t = 0. The threshold is at most 1 - 2e-5, so that every token
    attends to itself. Differentiable by values and features (once, in reverse mode; a threshold
    only gates). The backward pass recomputes S and is chunked torch code.

    Tokens whose features are not finite are treated as by `aggregate`; the mean is over pairs of
    the others. A token of zeros is similar to no token, so that its row is 0 if t > 0.

    Args:
        values: (N, Dv) or (B, N, Dv), floating.
        features: (N, D) or (B, N, D), floating; its dtype may differ.
        gamma: sharpness, >= 0.
        threshold: t. None for the mean of S over the image, as in SC-CLIP; a number; or
            ("mean", m) for m times the mean, m = 1.2 in ProxyCLIP.
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).

    Returns:
        A tensor of the shape and dtype of `values`. Sums are float32 at least.

    Raises:
        TypeError: not floating, or a threshold of another kind.
        ValueError: shapes or devices that do not fit, a number out of range, a backend that cannot
            run.
        NotImplementedError: a tangent of forward-mode differentiation.
    """
    v, f = value_and_feature_tokens(values, features)
    _check.no_tangent("content_attention", v, f)
    gamma = _check.number("gamma", gamma, low=0)
    threshold = _checked_threshold(threshold)
    resolved = resolve(backend, v, f)
    v, f = operands(resolved, v, f)
    out = _attend_to_content(v, f, gamma, threshold, resolved)
    return out.to(values.dtype).view_as(values)


def _attend_to_content(
    values: Tensor, features: Tensor, gamma: float, threshold: Threshold, backend: str
) -> Tensor:
    """`reference.content_attention` (B, N, Dv), with a checked threshold."""
    dtype = chunked.compute_dtype(values, features)
    if isinstance(threshold, float):
        similarity = torch.full(values.shape[:1], threshold, dtype=dtype, device=values.device)
    else:
        similarity = _mean_similarity(features.detach(), dtype, backend)
        similarity = similarity if threshold is None else similarity * threshold[1]
    return weighted_mean(values, features, reference.content_floor(similarity), gamma, backend)[0]


def _checked_threshold(threshold: Threshold) -> Threshold:
    """The threshold of `content_attention` with its number as a float."""
    if threshold is None:
        return None
    if not isinstance(threshold, tuple):
        return _check.number("threshold", threshold)
    if len(threshold) != 2 or threshold[0] != "mean":
        raise ValueError(f'threshold must be None, a number or ("mean", number), got {threshold}')
    return "mean", _check.number("threshold", threshold[1])


def _checked(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The checked tensors with a batch dimension."""
    for name, tensor in dict(q=q, k=k, v=v).items():
        _check.floating(name, tensor)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    _check.same_rank(q=q, k=k, v=v)
    queries, keys, values = (
        _check.batched(n, t, "B, H, N, d") for n, t in dict(q=q, k=k, v=v).items()
    )
    f = _check.tokens("features", features)
    if features.dim() != q.dim() - 1:
        raise ValueError(
            f"features must be (N, D) for q (H, N, d) and (B, N, D) for q (B, H, N, d), "
            f"got {tuple(features.shape)} with q {tuple(q.shape)}"
        )
    _check.same_device(q=q, k=k, v=v, features=features)
    batch, heads, n, d = queries.shape
    _check.shape("k", keys, (batch, heads, n, d), "like q")
    _check.shape("v", values, (batch, heads, n, values.shape[-1]), "for the tokens of q")
    _check.shape("features", f, (batch, n, f.shape[-1]), "for the tokens of q")
    return queries, keys, values, f
