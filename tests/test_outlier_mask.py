import math

import pytest
import torch
from cases import DEVICES, RUNS

import scclip_fast as sf
from scclip_fast import reference


def torch_quantile(scores, contamination):
    """`torch.quantile` of each row, (B, 1).

    Releases that round the rank to the dtype of the scores move it onto whole numbers. For these,
    the arithmetic of torch 2.14 is written out.
    """
    steps = (torch.arange(51) >= 45).float()
    if torch.quantile(steps, 0.9) < 1:
        return torch.quantile(scores, 1 - contamination, dim=-1, keepdim=True)
    fraction = torch.tensor(1 - contamination, dtype=scores.dtype).item()
    below, weight = divmod(fraction * (scores.shape[1] - 1), 1)
    low, high = scores.sort().values[:, [int(below), math.ceil(below + weight)]].split(1, dim=1)
    return torch.lerp(low, high, torch.full_like(low, weight))


def hard_scores(n):
    """Rows (7, n) whose quantile a sort finds, and a search for it may miss."""
    scores = torch.rand(7, n)
    scores[1] = scores[1].mul(4).round() / 4  # ties
    scores[2] = 1 + torch.randint(3, (n,)) * 2.0**-23  # nothing lies between neighbours
    scores[3] = torch.randn(n) * 1e38 * 10  # infinities, and differences that overflow
    scores[4][scores[4] < 0.6] = torch.nan
    scores[5] = torch.tensor([-0.0, 0.0, -torch.inf, 1e-45, -1e-45])[torch.randint(5, (n,))]
    scores[6] = torch.nan
    return scores


class TestOutlierMask:
    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("device, backend", RUNS)
    @pytest.mark.parametrize("n", [1, 2, 30, 441, 9001])  # 9001: two steps of a program
    def test_hard_scores(self, device, backend, n):
        for contamination in (0.05, 0.5):
            scores = hard_scores(n)
            mask = sf.outlier_mask(scores.to(device), contamination, backend=backend)
            assert torch.equal(mask.cpu(), reference.outlier_mask(scores, contamination))
            strided = scores.to(device).repeat_interleave(2, dim=1)[:, ::2]
            assert torch.equal(sf.outlier_mask(strided, contamination, backend=backend), mask)

    @pytest.mark.gpu
    @pytest.mark.parametrize("shape", [(1, 5184), (1, 82_944), (64, 196)])
    def test_images(self, shape):
        scores = torch.rand(shape, device="cuda")
        mask = sf.outlier_mask(scores, backend="triton")
        assert torch.equal(mask, sf.outlier_mask(scores, backend="torch"))

    @pytest.mark.parametrize("contamination", [0.01, 0.05, 0.1, 1 / 3, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_torch_quantile(self, contamination, dtype):
        """The masks agree at every N, also where the rank (N - 1)(1 - contamination) is whole."""
        squares = [side * side for side in range(1, 34)]
        for n in [*range(1, 601), *squares, 5184]:
            scores = torch.rand(4, n, dtype=dtype) * torch.rand(4, 1, dtype=dtype)
            mask = sf.outlier_mask(scores, contamination)
            assert torch.equal(mask, scores > torch_quantile(scores, contamination)), n
            assert torch.equal(sf.outlier_mask(scores[0], contamination), mask[0])

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(
        "side, contamination, count",
        [(21, 0.05, 23), (9, 0.05, 5), (31, 0.05, 49), (19, 0.1, 37), (29, 0.1, 85)],
    )
    def test_whole_ranks(self, device, side, contamination, count):
        """float32(0.95) lies below 0.95, so that the token at the whole rank is an outlier too.

        The step of the scores is at that token, and is larger than rounding.
        """
        n = side * side
        scores = torch.ones(n)
        scores[:count] = 2  # the lowest of the upper ones has the rank (N - 1)(1 - contamination)
        scores = scores[torch.randperm(n)].to(device)
        mask = sf.outlier_mask(scores, contamination)
        assert torch.equal(mask, scores == 2)

    @pytest.mark.parametrize("contamination", [0.05, 0.1, 1 / 3])
    def test_more_scores_than_float32_counts(self, contamination):
        n = 2**24 + 3
        scores = (torch.arange(n, dtype=torch.int32) * 16 + 0x3F800000).view(torch.float32)
        rank = torch.tensor(1 - contamination).item() * (n - 1)
        mask = sf.outlier_mask(scores, contamination)
        first = math.floor(rank) + 1
        assert not mask[:first].any() and mask[first:].all()

    def test_largest_scores(self):
        """The interpolation neither overflows nor returns NaN, also between infinities."""
        largest = torch.finfo(torch.float32).max
        scores = torch.full((4, 41), 1.0)
        scores[0, :3] = largest
        scores[1], scores[1, :3] = -largest, largest
        scores[2, :3] = torch.inf
        scores[3], scores[3, :3] = -torch.inf, 0
        for contamination in (0.05, 0.06, 0.07):  # the rank is 38, 37.6 and 37.2
            mask = sf.outlier_mask(scores, contamination)
            assert mask[:, :3].all() and not mask[:, 3:].any()

    def test_nan_is_left_out(self):
        scores = torch.rand(60)
        expected = sf.outlier_mask(scores, 0.1)
        with_nan = torch.cat([scores, torch.full((40,), torch.nan)])
        assert torch.equal(
            sf.outlier_mask(with_nan, 0.1), torch.cat([expected, torch.zeros(40).bool()])
        )
        assert not sf.outlier_mask(torch.full((3, 5), torch.nan)).any()

    def test_equal_scores_are_no_outliers(self):
        assert not sf.outlier_mask(torch.ones(2, 50)).any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_short_dtypes(self, dtype):
        scores = torch.rand(3, 50).to(dtype)
        assert torch.equal(sf.outlier_mask(scores), sf.outlier_mask(scores.float()))

    def test_empty_batch(self):
        assert sf.outlier_mask(torch.empty(0, 9)).shape == (0, 9)
