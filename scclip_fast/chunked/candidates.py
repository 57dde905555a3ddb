"""The candidates of a search: the tokens that rank nearest to each row, a few more than k."""

from __future__ import annotations

import torch
from torch import Tensor

from .distances import finite_tokens, pair_distances
from .tiles import compute_dtype, spans
from .topk import GROUP, smallest, smallest_grouped


def band(k: int) -> int:
    """The number of candidates on either side of the k-th place that are measured.

    The distances of many neighbours lie closer together than those of a few.
    """
    return max(4, k // 8)


def list_sizes(k: int, others: int, measure_all: bool) -> tuple[int, int]:
    """The number of candidates that a search for k of `others` tokens keeps, and measures."""
    n_candidates = min(k + band(k), others)
    n_measured = n_candidates if measure_all else min(n_candidates, n_candidates - k + band(k))
    return n_candidates, n_measured


class Candidates:
    """The n tokens with the smallest scores for each row (B, M, D). Tokens are added in pieces.

    Args:
        rows: (B, M, D).
        n: number of candidates of each row.
        step: number of rows in one product.
        self_index: the index of each row among the tokens, so that no row is its own candidate: the
            index of the first row where rows are consecutive tokens, or indices (M,); None where
            rows are no tokens.
        centre: (B, 1, D) in the dtype of the products, a point that is subtracted from both sides.
            Distances do not depend on it, and the products lose no digits to a common offset.
            Without a centre, distances are measured and nothing is multiplied.

    Attributes:
        scores: (B, M, n), ascending: ||x_j||^2 - 2 x_i x_j of the centred tokens, or the distance
            itself where there is no centre.
        indices: (B, M, n) of these tokens.
        norms: (B, M) of the centred rows.
    """

    #: The values that decide, of candidates: squared distances.
    measure = staticmethod(pair_distances)

    def __init__(
        self,
        rows: Tensor,
        n: int,
        step: int,
        self_index: int | Tensor | None,
        centre: Tensor | None,
    ):
        self._rows, self._step, self._self_index, self._centre = rows, step, self_index, centre
        shape = (*rows.shape[:2], n)
        dtype = self.measured_dtype(rows) if centre is None else centre.dtype
        self.scores = rows.new_full(shape, torch.inf, dtype=dtype)
        self.indices = torch.zeros(shape, dtype=torch.int64, device=rows.device)
        self.norms = self.scores.new_empty(shape[:2])

    @staticmethod
    def measured_dtype(tokens: Tensor) -> torch.dtype:
        """The dtype of measured values."""
        return compute_dtype(tokens)

    @staticmethod
    def centre(tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The argument `centre` for a search among tokens (B, N, D)."""
        return centre(tokens, dtype)

    def add(self, tokens: Tensor, first: int) -> None:
        """Ranks tokens (B, c, D), whose indices count from `first`, among those added before."""
        if self._centre is not None:
            columns = self._columns(tokens, self._centre)
        width = -(-tokens.shape[1] // GROUP) * GROUP
        # One tile for all rows: allocating and freeing one this large each time takes longer.
        scores = self.scores.new_empty(len(tokens), self._step, width)
        for span in spans(self._rows.shape[1], self._step):
            tile = scores[:, : span.stop - span.start]
            if self._centre is not None:
                self._multiply(*columns, self._centre, span, tile)
            else:
                self._measure(tokens, span, tile)
            self._leave_out_self(tile, span, first)
            _keep_smallest(self.scores[:, span], self.indices[:, span], tile, first)

    def squares(self) -> Tensor:
        """The estimates (B, M, n) of squared distances that the scores are, for the certificate."""
        return self.scores + self.norms.square().unsqueeze(-1)

    def _columns(self, tokens: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """The operand of products, and the numbers that are added to them, of tokens (B, c, D)."""
        return centred(tokens, centre, multiple=GROUP)

    def _multiply(
        self, columns: Tensor, squares: Tensor, centre: Tensor, span: slice, tile: Tensor
    ) -> None:
        """Writes ||x_j||^2 - 2 x_i x_j of centred tokens to the tile, for the rows of `span`."""
        rows, row_squares = centred(self._rows[:, span], centre)
        self.norms[:, span] = row_squares.sqrt()
        torch.baddbmm(squares.unsqueeze(1), rows, columns.mT, alpha=-2, out=tile)

    def _measure(self, tokens: Tensor, span: slice, tile: Tensor) -> None:
        """Writes ||x_i - x_j|| to the tile, for the rows of `span`.

        Finite pairs come first, then those whose square overflows, then tokens that are not finite,
        then the columns that only fill up the tile.
        """
        rows, tokens = self._rows[:, span].to(tile.dtype), tokens.to(tile.dtype)
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(rows, tokens, compute_mode=mode)
        largest = torch.finfo(tile.dtype).max
        distances.masked_fill_(distances.isinf(), largest / 2)
        broken = ~finite_tokens(tokens)
        distances.masked_fill_(distances.isnan() | broken.unsqueeze(1), largest)
        n = tokens.shape[1]
        tile[..., :n], tile[..., n:] = distances, torch.inf

    def _leave_out_self(self, tile: Tensor, span: slice, first: int) -> None:
        if isinstance(self._self_index, Tensor):
            columns = torch.arange(first, first + tile.shape[-1], device=tile.device)
            tile.masked_fill_(self._self_index[span].unsqueeze(-1) == columns, torch.inf)
        elif self._self_index is not None:
            offset = self._self_index + span.start - first
            tile.diagonal(offset=offset, dim1=-2, dim2=-1).fill_(torch.inf)


def centre(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The `remedian` (B, 1, D) of a sample of the tokens (B, N, D).

    Any point is right. This one is near most tokens however far away a few of them are.
    """
    n = tokens.shape[1]
    # A slice, not an index: `centre` takes 0.07 instead of 0.09 ms on 196 tokens.
    drawn = tokens[:, : n - (n - 1) % 8 : (n - 1) // 8] if n > 8 else tokens[:, sample(n, None)]
    return remedian(drawn.to(dtype))


def sample(tokens: int, device: torch.device | None) -> Tensor:
    """9 indices of tokens, evenly spread."""
    places = torch.arange(9, device=device)
    return places * ((tokens - 1) // 8) if tokens > 8 else places * (tokens - 1) // 8


def remedian(tokens: Tensor) -> Tensor:
    """The median of medians of three, (B, 1, D), of 9 tokens, channel by channel.

    An estimate of the median by elementwise operations alone (Rousseeuw and Bassett, "The
    remedian", JASA 1990), which `median` takes 10 times as long for. 0 replaces what is not finite.
    """
    medians = tokens.nan_to_num(nan=0, posinf=0, neginf=0)
    for _ in range(2):
        a, b, c = medians.chunk(3, dim=1)
        medians = torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
    return medians


def centred(tokens: Tensor, centre: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """tokens (b, n, D) - centre and the squared norms (b, n), with n filled up to a multiple.

    A token whose norm is not finite is replaced by 0 with the largest finite norm. A token that
    only fills up is 0 with an infinite norm. In this order they come last.
    """
    batch, n, width = tokens.shape
    missing = -n % multiple
    result = centre.new_empty(batch, n + missing, width)
    result[:, n:] = 0
    if torch.promote_types(tokens.dtype, centre.dtype) != centre.dtype:
        # Rounded before the subtraction, tokens would be off by a share of their own norms.
        torch.sub(tokens, centre, out=result[:, :n])
    else:
        result[:, :n].copy_(tokens)  # a subtraction of two dtypes would convert to another tensor
        result[:, :n] -= centre
    squares = torch.linalg.vector_norm(result, dim=-1).square_()
    broken = ~squares.isfinite()
    if broken.device.type != "cpu" or broken.any():  # a GPU would have to be waited for
        squares.masked_fill_(broken, torch.finfo(squares.dtype).max)
        result.masked_fill_(broken.unsqueeze(-1), 0)
    squares[:, n:] = torch.inf
    return result, squares


def _keep_smallest(best_scores: Tensor, best_indices: Tensor, scores: Tensor, first: int) -> None:
    """Merges scores (b, r, c), whose columns count from `first`, into the best so far (b, r, n)."""
    n = best_scores.shape[-1]
    smallest_scores, position = smallest_grouped(scores, n)
    position += first
    if first > 0 or smallest_scores.shape[-1] < n:
        smallest_scores, order = smallest(torch.cat([best_scores, smallest_scores], dim=-1), n)
        position = torch.cat([best_indices, position], dim=-1).gather(-1, order)
    best_scores.copy_(smallest_scores)
    best_indices.copy_(position)
