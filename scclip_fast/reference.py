"""The equations in plain torch: the specification every other implementation is tested against.

The functions are written to be read, on explicit N x N matrices, in the floating dtype of their
arguments. With `backend="reference"`, each op passes its arguments in float64, whatever dtype they
have, and casts the result and the gradients once, so that no backend is more exact. Shapes: x, f, v
are (B, N, D) tokens, one row of patches after the other; scores and masks are (B, N).

Sources: SC-CLIP (Bai et al., arXiv 2411.15869) for everything but the two LOF variants, which are
Schubert, Zimek and Kriegel, "Local outlier detection reconsidered", DMKD 2014 ("scclip") and
Breunig et al., "LOF: identifying density-based local outliers", SIGMOD 2000 ("breunig").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12  # the least norm, as in F.normalize
AGGREGATE_EPS = 1e-6  # added to the row sums of the thresholded similarity, as in SC-CLIP
SOFTMAX_EPS = 1e-30  # makes a row without any weight (a zero feature) 0 instead of 0 / 0
BREUNIG_EPS = 1e-10  # added to the mean reachability distance, as in scikit-learn


def squared_distances(x: Tensor, queries: Tensor | None = None) -> Tensor:
    """d2(i, j) = ||q_i - x_j||^2, (B, M, N), and NaN for pairs with a token that is not finite.

    Without queries (B, M, D), the queries are the tokens x (B, N, D) themselves.
    """
    queries = x if queries is None else queries
    d2 = torch.cdist(queries, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.where(_finite_pairs(x, queries), d2, torch.nan)


def cosine_distances(x: Tensor, queries: Tensor) -> Tensor:
    """1 - cos(q_i, x_j) = ||q_i / ||q_i|| - x_j / ||x_j|| ||^2 / 2, (B, M, N), and 1 for zeros."""
    distances = squared_distances(divided_by_norm(x), divided_by_norm(queries)) / 2
    either_zero = (x == 0).all(dim=-1)[:, None, :] | (queries == 0).all(dim=-1)[:, :, None]
    return torch.where(either_zero & ~distances.isnan(), 1, distances)


def divided_by_norm(x: Tensor) -> Tensor:
    """x_i / ||x_i||, 0 for a token of zeros, and NaN in a token that is not finite.

    A token is scaled by its largest entry first, because its squares could over- or underflow.
    """
    largest = x.abs().amax(dim=-1, keepdim=True)
    scaled = x / torch.where(largest > 0, largest, 1)
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=1)


def negative_products(x: Tensor, queries: Tensor) -> Tensor:
    """-q_i x_j, (B, M, N), and NaN for pairs with a token that is not finite."""
    return torch.where(_finite_pairs(x, queries), -(queries @ x.mT), torch.nan)


#: What the nearest tokens have the least of, by metric.
DISTANCES = {
    "euclidean": squared_distances,
    "cosine": cosine_distances,
    "inner_product": negative_products,
}


def knn(
    x: Tensor, k: int, queries: Tensor | None = None, metric: str = "euclidean"
) -> tuple[Tensor, Tensor]:
    """Values and indices (B, M, k) of the k tokens of x nearest to each query, ties by lower index.

    Without queries, the k nearest *others* of each token. The values are squared distances, for
    "cosine" 1 - cos, and for "inner_product" the products, the largest first. Tokens that are not
    finite come last, with the value NaN.
    """
    distances = DISTANCES[metric](x, x if queries is None else queries)
    last = distances.isnan().int()
    if queries is None:
        last.diagonal(dim1=-2, dim2=-1).fill_(2)  # the token itself
    by_distance = distances.argsort(dim=-1, stable=True)
    by_kind = last.gather(-1, by_distance).argsort(dim=-1, stable=True)
    indices = by_distance.gather(-1, by_kind)[..., :k]
    nearest = distances.gather(-1, indices)
    return -nearest if metric == "inner_product" else nearest, indices


def simplified_lof(k_distance: Tensor, neighbors: Tensor, rows: slice = slice(None)) -> Tensor:
    """LOF_i = mean over j in N_k(i) of kappa_i / kappa_j, (B, M), with k-distances kappa (B, N).

    kappa are squared distances. neighbors (B, M, k) are the neighbours of the tokens `rows`, by
    default of all, M = N.

    SC-CLIP takes the reachability of a point from its own k-distance, max(d2(i, j), kappa_i) =
    kappa_i, so that the local reachability density is 1 / kappa_i and LOF needs only kappa and the
    neighbour indices. The kappa of a token among more than k equal ones is 0. It is replaced by the
    smallest other kappa of the image, so that equal tokens score 1, not 0 / 0, and tokens beside
    them no more than their distances allow. A token whose squared distances overflow has the
    largest number for kappa, and therefore the highest score. A token that is not finite, or has
    fewer than k finite others, has the k-distance NaN and scores NaN.
    """
    limits = torch.finfo(k_distance.dtype)
    least = torch.where(k_distance > 0, k_distance, torch.inf).amin(dim=-1, keepdim=True)
    kappa = torch.where(k_distance == 0, least, k_distance).clamp(min=limits.tiny, max=limits.max)
    ratios = kappa[:, rows].unsqueeze(-1) / _gather_tokens(kappa, neighbors)
    # The sum of the ratios may overflow although their mean does not.
    scale = 2.0 ** -neighbors.shape[-1].bit_length()
    return ((ratios * scale).mean(dim=-1) / scale).clamp(max=limits.max)


def breunig_lof(distances: Tensor, neighbors: Tensor) -> Tensor:
    """The textbook LOF mean_j lrd_j / lrd_i of plain, sorted distances, as in scikit-learn."""
    k_distance = distances[..., -1]
    density = reachability_density(distances, neighbors, k_distance)
    ratios = density_ratio(density, neighbors, density)
    return torch.where(k_distance.isnan(), torch.nan, ratios)


def reachability_density(distances: Tensor, neighbors: Tensor, k_distance: Tensor) -> Tensor:
    """lrd_i = 1 / mean_j reach(i <- j), (B, M), with reach(i <- j) = max(k-distance(j), d(i, j)).

    neighbors (B, M, k) index the N tokens of k_distance (B, N). M = N if these are the rows too.
    """
    reachability = distances.maximum(_gather_tokens(k_distance, neighbors))
    density = 1 / (reachability.mean(dim=-1) + BREUNIG_EPS)
    return density.clamp(min=torch.finfo(density.dtype).tiny)  # infinite distances make it 0


def density_ratio(density: Tensor, neighbors: Tensor, row_density: Tensor) -> Tensor:
    """mean_j lrd_j / lrd_i, (B, M).

    lrd_j is density (B, N) at neighbors (B, M, k), lrd_i is row_density (B, M).
    """
    ratios = (_gather_tokens(density, neighbors) / row_density.unsqueeze(-1)).mean(dim=-1)
    return ratios.clamp(max=torch.finfo(ratios.dtype).max)


def norm_scores(x: Tensor) -> Tensor:
    """||x_i|| over the median norm of the image, (B, N), and NaN for tokens that are not finite.

    A token is scaled by its largest entry, because its squares could over- or underflow. An
    infinite entry over itself is NaN. If the median is 0, the norms themselves are the scores.
    """
    limits = torch.finfo(x.dtype)
    scale = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp(min=limits.tiny)
    norm = (torch.linalg.vector_norm(x / scale, dim=-1) * scale.squeeze(-1)).clamp(max=limits.max)
    median = quantile(norm, 0.5)
    return (norm / torch.where(median > 0, median, 1)).clamp(max=limits.max)


def outlier_mask(scores: Tensor, contamination: float) -> Tensor:
    """scores > quantile(scores, 1 - contamination), per image; (B, N) -> bool (B, N)."""
    return scores > quantile(scores, 1 - contamination)


def quantile(scores: Tensor, fraction: float) -> Tensor:
    """The linear quantile of each row of (B, N), without NaN, (B, 1).

    It equals `torch.quantile`, which `torch.compile(fullgraph=True)` and `torch.export` with a
    dynamic batch both reject. As in torch 2.14, the fraction has the dtype of the scores and the
    rank is float64, which is exact for any number of float32 scores. If two consecutive scores are
    too far apart to interpolate, the lower one is the result, which separates the same scores.
    """
    ordered = scores.sort(dim=-1).values  # NaN last
    count = scores.isnan().logical_not().sum(dim=-1, keepdim=True)
    exact = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
    rank = (count - 1).clamp(min=0) * scores.new_full((), fraction).to(exact)
    below = ordered.gather(-1, rank.floor().long())
    above = ordered.gather(-1, rank.ceil().long())
    value = torch.lerp(below, above, rank.frac().to(scores.dtype))
    return torch.where(value.isfinite(), value, below)


def repair(tokens: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Replaces masked tokens by the mean of their in-bounds, unmasked 8-neighbours, if any.

    A token that is not finite spreads to the mean of masked neighbours unless it is masked itself.
    """
    height, width = grid
    image, token = mask.nonzero(as_tuple=True)
    row, column = token // width, token % width
    total, count = torch.zeros_like(tokens[image, token]), tokens.new_zeros(())
    for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
        y, x = row + dy, column + dx
        neighbor = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        good = (y >= 0) & (y < height) & (x >= 0) & (x < width) & ~mask[image, neighbor]
        total = total + torch.where(good.unsqueeze(-1), tokens[image, neighbor], 0)
        count = count + good.to(tokens.dtype).unsqueeze(-1)
    mean = torch.where(count > 0, total / count.clamp(min=1), tokens[image, token])
    return tokens.index_put((image, token), mean)


def unit_vectors(f: Tensor) -> Tensor:
    """f_hat = f / ||f||, (B, N, D), and NaN in all channels of a token that is not finite.

    A token is not finite if it holds a NaN or an infinity, or if its norm overflows its dtype. The
    norm is held above 1e-12, as in torch.nn.functional.normalize.
    """
    norm = torch.linalg.vector_norm(f, dim=-1, keepdim=True)
    return f / norm.clamp(min=NORM_EPS).masked_fill(norm.isinf(), torch.nan)


def cosine_similarity(f: Tensor) -> Tensor:
    """S = f_hat f_hat^T, (B, N, N); NaN in the rows and columns of tokens that are not finite."""
    unit = unit_vectors(f)
    return unit @ unit.mT


def similarity(f: Tensor, beta: float, normalize: bool = True) -> Tensor:
    """S_beta = S * 1[S >= beta], (B, N, N), NaN where S is. Without `normalize`, S = f f^T."""
    return threshold(cosine_similarity(f) if normalize else f @ f.mT, beta)


def threshold(s: Tensor, beta: float) -> Tensor:
    """s * 1[s >= beta], NaN where s is NaN."""
    return torch.where(s < beta, 0, s)


def adaptive_aggregate(features: Tensor, similarity_matrix: Tensor) -> Tensor:
    """A V with A = S / (rowsum(S) + 1e-6), from an explicit S (B, N, N) and V (B, N, D)."""
    row_sum = similarity_matrix.sum(dim=-1, keepdim=True)
    return similarity_matrix / (row_sum + AGGREGATE_EPS) @ features


def mean_similarity(f: Tensor) -> Tensor:
    """mu = mean of S over all pairs of finite tokens of an image = ||mean_i f_hat_i||^2, (B,)."""
    unit = unit_vectors(f)
    n_finite = unit[..., 0].isfinite().sum(dim=1, keepdim=True)
    return (unit.nansum(dim=1) / n_finite.clamp(min=1)).square().sum(dim=-1)


def content_floor(threshold: Tensor) -> Tensor:
    """Similarity threshold of content attention: min(threshold, 1 - 2e-5), (B,).

    The limit lets every token attend to itself. If all tokens are equal, S and its mean are 1 up to
    rounding, and S >= mean would be chance. Tensor cores, which truncate their sums, compute S = 1
    too small by 1e-5 at a few thousand dimensions.
    """
    return threshold.clamp(max=1 - 2e-5)


def content_attention(values: Tensor, f: Tensor, gamma: float, threshold: Tensor) -> Tensor:
    """C v with C the softmax over {j : S_ij >= threshold} of gamma S_ij, threshold (B,)."""
    return aggregate(values, f, content_floor(threshold), gamma)[0]


def weights(s: Tensor, floor: Tensor, gamma: float | None) -> Tensor:
    """The weight s 1[s >= floor], or with a gamma exp(gamma (s - 1)) 1[s >= floor].

    The second one is the numerator of softmax(gamma (s - mu)). As s <= 1, it needs no running
    maximum. A similarity that is NaN has weight 0.
    """
    weight = s if gamma is None else torch.exp(gamma * (s - 1))
    return torch.where(s >= floor, weight, 0)


def aggregate(
    values: Tensor, f: Tensor, floor: Tensor, gamma: float | None
) -> tuple[Tensor, Tensor]:
    """Weighted means (B, N, Dv) of `values` (B, N, Dv), and the sums of the weights (B, N).

    out_i = sum_j w_ij v_j / (sum_j w_ij + eps), w = `weights`(S, floor, gamma), floor (B,).
    gamma=None with floor=beta is SC-CLIP's aggregation; gamma with floor=`content_floor` its
    content attention.

    A token whose features are not finite (`unit_vectors`) has weight 0 for all others, whatever its
    values are, and its own row of both results is NaN. Values of finite tokens must be finite,
    because they spread as in any product.
    """
    s = cosine_similarity(f)
    finite = s.diagonal(dim1=-2, dim2=-1).isfinite()
    weight = weights(s, floor[:, None, None], gamma)
    total = torch.where(finite, weight.sum(dim=-1), torch.nan)
    finite_values = torch.where(finite.unsqueeze(-1), values, 0)
    return weight @ finite_values / (total + normaliser_eps(gamma)).unsqueeze(-1), total


def normaliser_eps(gamma: float | None) -> float:
    """The eps that `aggregate` adds to the sums of the weights."""
    return AGGREGATE_EPS if gamma is None else SOFTMAX_EPS


def attention(
    q: Tensor, k: Tensor, v: Tensor, content: Tensor, alpha: float, scale: float
) -> Tensor:
    """(1 - alpha) softmax(scale q k^T) v + alpha content.

    q and k are (B, H, N, d), v and content (B, H, N, dv).
    """
    self_attention = torch.softmax(scale * (q @ k.mT), dim=-1) @ v
    return (1 - alpha) * self_attention + alpha * content


def upsampled_labels(maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """argmax_c and max_c of maps (B, C, h, w) upsampled to a size (H, W); NaN counts as -inf.

    The labels (B, H, W) are those of the first of equal classes.
    """
    scores = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    values, labels = scores.masked_fill(scores.isnan(), -torch.inf).max(dim=1)
    return labels, values


def _gather_tokens(per_token: Tensor, neighbors: Tensor) -> Tensor:
    """per_token (B, N) at neighbors (B, N, k)."""
    return per_token.gather(-1, neighbors.flatten(1)).view_as(neighbors)


def _finite_pairs(x: Tensor, queries: Tensor) -> Tensor:
    """Mask (B, M, N) of the pairs of finite tokens of queries (B, M, D) and x (B, N, D)."""
    finite, finite_queries = (tokens.isfinite().all(dim=-1) for tokens in (x, queries))
    return finite_queries[:, :, None] & finite[:, None, :]
