"""Ops over rows that three processes share have the bits of one process, and raise on all ranks."""

import pytest
import ranks
import torch
from tolerance import assert_close

from scclip_fast import distributed
from scclip_fast.distributed.shards import Shards, rows_of

CASES = [(name, op) for name, *_ in ranks.cases() for op in ranks.OPS]
CASES += [(f"kernels-{kind}", op) for kind, (_, op) in ranks.KERNEL_CASES.items()]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of every rank, as `ranks.run` saves them."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.run, (str(folder),), nprocs=ranks.WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks.WORLD)]


def of_all(found, case, op, world):
    """The tensors that an op returned to the ranks of a group, concatenated in their order."""
    members = [rank for rank in found if world in rank[case]]
    return [torch.cat(parts) for parts in zip(*(m[case][world][op] for m in members), strict=True)]


def assert_same(out, expected):
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case, op", CASES)
def test_the_bits_of_one_process(found, case, op):
    # "kernels-far" and "kernels-broken" fail if own rows are searched, not whole tiles.
    alone = of_all(found, case, op, world=1)
    for world in (2, 3):
        assert_same(of_all(found, case, op, world), alone)


@pytest.mark.parametrize("case, op", CASES)
def test_what_the_op_itself_gives(found, case, op):
    """The op shares products between two tokens and sums neighbours in another order."""
    # "kernels-ties" fails if a list without its own row loses its first entry, or if a tie goes to
    # the later piece; all kernel cases fail if k tokens are kept and not k + 1.
    expected = found[0][case]["op"][op]
    for out, ref in zip(of_all(found, case, op, world=3), expected, strict=True):
        assert out.dtype == ref.dtype
        if op == "aggregate":
            assert_close(out, ref=ref.double())
        elif out.dtype == torch.int64:
            assert_same(out, ref)
        else:
            torch.testing.assert_close(out, ref, rtol=2e-6, atol=0, equal_nan=True)


def test_cases_have_what_they_are_for(found):
    """There are several pieces and tiles, ties at the k-th place, and tokens without a score."""
    assert {"pieces", "whole", "kernels"} == {case.split("-")[0] for case, _ in CASES}
    for case in ("pieces-ties-float32", "kernels-ties"):
        distances, indices = found[0][case]["op"]["knn"]
        assert (distances == 0).all(dim=-1).any() and (indices.diff(dim=-1) > 0).all(dim=-1).any()
    for case in ("pieces-broken-float32", "kernels-broken"):
        assert found[0][case]["op"]["scclip"][0].isnan().sum() == 3


@pytest.mark.parametrize("op", ["knn", "lof_scores", "aggregate"])
def test_no_rank_holds_all_rows(found, op):
    """A rank holds its rows, its lists and pieces of other rows, but nothing of size N x D."""
    tokens, width = ranks.LARGE
    for rank in found:
        assert tokens * width / 3 <= rank["largest"][op] < tokens * width / 2


def test_what_the_kernels_do_not_take(found):
    """The torch path has the place of the kernels for more neighbours than they find."""
    assert [rank["many neighbors"] for rank in found] == [[True] * 2] * ranks.WORLD


def test_no_gradient(found):
    assert [rank["gradient"] for rank in found] == [[False] * 4] * ranks.WORLD


#: By fault: the error of rank 0, and that of the last rank if it differs.
FAULTS = {
    "k": "ValueError: all ranks must agree on k, got 5 on rank 0 and 6 on rank 2",
    "k that compares equal": "ValueError: all ranks must agree on k, got 5 on rank 0 and 5.0 on",
    "width": "ValueError: all ranks must agree on the width of x, got 24 on rank 0 and 23 on",
    "dtype": "ValueError: all ranks must agree on the dtype of x, got torch.float32 on rank 0",
    "width of values": "ValueError: all ranks must agree on the width of values, got 24 on rank 0",
    "beta": "ValueError: all ranks must agree on beta, got 0.4 on rank 0 and 1.4 on rank 2",
    "variant": "ValueError: all ranks must agree on variant, got 'scclip' on rank 0 and 'breunig'",
    "op": "ValueError: all ranks must agree on op, got 'knn' on rank 0 and 'lof_scores' on rank 2",
    "device": "ValueError: all ranks must agree on the kind of device, got 'cpu' on rank 0",
    "tokens": ("ValueError: rank 2 has an error: x must have", "TypeError: x must have a floating"),
    "rank": ("ValueError: rank 2 has an error: x must be (n, D)", "ValueError: x must be (n, D)"),
    "rows": ("ValueError: rank 2 has an error: all tensors", "ValueError: all tensors must have"),
    "gradient": (
        "ValueError: rank 2 has an error: features requires",
        "ValueError: features requires a gradient, which is not computed: detach it",
    ),
    "backend": "ValueError: all ranks must agree on the backend, got 'torch' on rank 0 and",
    "no kernels": 'ValueError: backend "triton" cannot run here: the kernels take',
    "no channel": "ValueError: x must be (n, D), the rows of one rank, with D of at least 1, got",
    "k of 30": "ValueError: k must be smaller than the number of tokens, got k=30 with N=30 tokens",
    "no k": "TypeError: k must be an int, got float",
    "no beta": "ValueError: beta must be a finite number",
    "no variant": "ValueError: variant must be one of scclip, breunig, got 'textbook'",
    "no rows": "ValueError: at least one rank must have a row, got none on any",
    "group": (
        "ValueError: group must be one that this process is in",
        "ValueError: k must be smaller than the number of tokens, got k=50 with N=20 tokens",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_rank_raises(found, fault):
    expected = FAULTS[fault]
    first, last = (expected, expected) if isinstance(expected, str) else expected
    for rank, start in ((0, first), (2, last)):
        assert ": ".join(found[rank]["faults"][fault]).startswith(start)
    assert found[1]["faults"][fault] in (found[0]["faults"][fault], found[2]["faults"][fault])


def test_all_faults_are_looked_at_and_none_blocks_the_group(found):
    assert found[0]["faults"].keys() == FAULTS.keys()
    assert [rank["afterwards"] for rank in found] == [
        [[1], [0], [1]],
        [[2], [3], [4]],
        [[5], [6], [7]],
    ]


def test_tiles_are_filled_by_own_rows(monkeypatch):
    """Zeros could lie far from all tokens, without a certificate."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    x = torch.randn(2, 3).T.contiguous().T
    shards = Shards(None, [5, 2, 6], x.device)
    rows, first, kept = shards.whole_tiles(x, 4)
    assert first == 4 and kept == slice(1, 3) and rows.is_contiguous()
    assert torch.equal(rows[0], x[[1, 0, 1, 0]])


def test_rows_are_dense():
    with pytest.raises(
        TypeError, match=r"x must be dense, got a tensor of layout torch.sparse_coo"
    ):
        rows_of(x=torch.eye(3).to_sparse())


def test_without_a_process_group():
    with pytest.raises(ValueError, match="no process group: call init_process_group first"):
        distributed.knn(torch.randn(9, 2), 3)
