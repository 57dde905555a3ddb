"""The grids of `cases` cover all pairs of parameters."""

from itertools import combinations, product

from cases import BATCHES, DTYPES, TOKENS, WIDTHS, grid


def pairs(cases):
    return {
        (i, j, case[i], case[j]) for case in cases for i, j in combinations(range(len(case)), 2)
    }


def test_all_pairs_occur():
    full = [case for case in product(BATCHES, TOKENS, WIDTHS, DTYPES) if case[:2] != (3, 1)]
    assert set(full) <= set(grid("torch-gpu"))
    assert pairs(full) <= pairs(grid("torch"))
    short = [case for case in full if case[1] <= 33]
    assert pairs(short) <= pairs(grid("interpreter"))
    long = {case[1:3] for case in full if case[1] * case[2] < 577 * 100}
    assert long == {case[1:3] for case in grid("interpreter")}
