"""The candidates of a search for the largest inner products."""

from __future__ import annotations

import torch
from torch import Tensor

from .candidates import Candidates
from .certificate import product_margin
from .distances import finite_tokens, pair_products
from .tiles import longest_dtype
from .topk import GROUP


class ProductCandidates(Candidates):
    """The n tokens with the smallest scores for each row (B, M, D), by inner products.

    The score of a token is a bound that its true score -q_i x_j / ||q_i|| does not fall below
    (`certificate.py`). The products of unit rows with tokens do not overflow.

    Attributes:
        scores: (B, M, n), ascending: the bound, or the measured -q_i x_j without a centre.
        indices: (B, M, n) of these tokens.
        norms: (B, M) of the rows in float64, 1 for a row of zeros.
    """

    measure = staticmethod(pair_products)

    def __init__(
        self,
        rows: Tensor,
        n: int,
        step: int,
        self_index: int | Tensor | None,
        centre: Tensor | None,
    ):
        super().__init__(rows, n, step, self_index, centre)
        self.norms = self.norms.to(longest_dtype(rows.device))

    @staticmethod
    def measured_dtype(tokens: Tensor) -> torch.dtype:
        """The dtype of measured products, so that they are exact to float32."""
        return longest_dtype(tokens.device)

    @staticmethod
    def centre(tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros in the dtype of the products: inner products depend on the origin."""
        return tokens.new_zeros(len(tokens), 1, 1, dtype=dtype)

    def _columns(self, tokens: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, filled up to whole groups, and minus the margins of their products."""
        batch, n, width = tokens.shape
        columns = centre.new_zeros(batch, n + -n % GROUP, width)
        columns[:, :n].copy_(tokens)
        norms = torch.linalg.vector_norm(columns, dim=-1)
        margins = -product_margin(norms, width)
        # A norm that overflows bounds nothing, so its token is a candidate of every row.
        overflows, largest = ~norms.isfinite(), torch.finfo(norms.dtype).max
        margins.masked_fill_(overflows, -largest)
        columns.masked_fill_(overflows.unsqueeze(-1), 0)
        margins[:, :n].masked_fill_(~finite_tokens(tokens), largest)
        margins[:, n:] = torch.inf
        return columns, margins

    def _multiply(
        self, columns: Tensor, margins: Tensor, centre: Tensor, span: slice, tile: Tensor
    ) -> None:
        """Writes the scores of the columns to the tile, for the rows of `span`."""
        rows = self._rows[:, span].to(centre.dtype)
        largest = rows.abs().amax(dim=-1, keepdim=True)
        largest = largest.where((largest > 0) & largest.isfinite(), 1)
        rows = rows / largest  # squares of the quotients neither over- nor underflow
        norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        norms = norms.where((norms > 0) & norms.isfinite(), 1)
        self.norms[:, span] = (largest.to(self.norms.dtype) * norms).squeeze(-1)
        rows = rows.div_(norms).nan_to_num_(nan=0, posinf=0, neginf=0)
        torch.baddbmm(margins.unsqueeze(1), rows, columns.mT, alpha=-1, out=tile)

    def _measure(self, tokens: Tensor, span: slice, tile: Tensor) -> None:
        """Writes the measured -q_i x_j to the tile, in the order of `Candidates._measure`."""
        finite, n = finite_tokens(tokens), tokens.shape[1]
        largest = torch.finfo(tile.dtype).max
        tokens, rows = tokens.to(tile.dtype), self._rows[:, span].to(tile.dtype)
        for row in range(rows.shape[1]):
            products = (tokens * rows[:, row, None]).sum(dim=-1).neg_()
            products.clamp_(-largest / 2, largest / 2).nan_to_num_(nan=largest)
            tile[:, row, :n] = products.masked_fill_(~finite, largest)
        tile[..., n:] = torch.inf
