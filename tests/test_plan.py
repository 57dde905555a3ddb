"""Plans of launches, whose compiled kernels Triton's interpreter stands in for.

Mutations, with the test that each made fail: no zeros in the workspace, regions that overlap (both
crash the interpreter in `test_nearest`); the pointer of another input (all); no alignment, or no
strides, in the key (`test_layouts`); operations of torch or shared storages that do not prevent
a plan (`test_no_plan`).
"""

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import GPU
from torch.utils._python_dispatch import _disable_current_modes
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from scclip_fast.kernels import _plan, _run, aggregate, knn
from scclip_fast.kernels.aggregate import _aggregate, aggregate_triton
from scclip_fast.kernels.knn import _nearest, nearest_triton
from scclip_fast.kernels.mean_similarity import _mean_similarity, mean_similarity_triton

ONE_AT_A_TIME = threading.Lock()  # the interpreter keeps the number of its program in a global


def as_tensor(value):
    """A tensor at the address of a pointer. The interpreter does not ask for its length."""
    if isinstance(value, _plan.Pointer):
        memory = (ctypes.c_char * value.dtype.itemsize).from_address(value.address)
        return torch.frombuffer(memory, dtype=value.dtype)
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor(
            as_tensor(value.base), value.shape, value.strides, value.block_shape
        )
    return value


def interpret(kernel, programs, /, *values, **arguments):
    # The interpreter's own operations of torch are not those of a launcher.
    with ONE_AT_A_TIME, _disable_current_modes():
        kernel[(programs,)](*values, **arguments)


class Interpreted(CompiledKernel):
    """Stands in for a compiled kernel, and runs in the interpreter."""

    def __init__(self, kernel):
        self.kernel, self.module = kernel, None

    def __getitem__(self, grid):
        return lambda *values: interpret(self.kernel, grid[0], *map(as_tensor, values))


@pytest.fixture
def repetitions(monkeypatch):
    """The plans that are repeated, as they are."""
    if GPU:
        pytest.skip("the interpreter is off")

    def call(kernel, programs, arguments):
        interpret(kernel, programs, **arguments)
        return Interpreted(kernel)

    repeated, repeat = [], _plan.Plan.__call__
    monkeypatch.setattr(_run, "keeps_compiled", lambda device: True)
    monkeypatch.setattr(_run, "call", call)
    monkeypatch.setattr(
        _plan.Plan, "__call__", lambda self, inputs: repeated.append(self) or repeat(self, inputs)
    )
    _run._compiled.cache_clear()
    yield repeated
    _run._compiled.cache_clear()


def equal(found, expected):
    return all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "shape, n_queries, k",
    [
        ((2, 40, 8), None, 3),
        ((1, 140, 16), None, 9),
        pytest.param((1, 140, 16), 130, 5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("most_columns", [0, knn.MOST_COLUMNS_OF_PANEL], ids=["bins", "panel"])
def test_nearest(shape, n_queries, k, most_columns, repetitions, monkeypatch):
    """A repetition gives the bits of the launches, on other tokens and in used memory."""
    monkeypatch.setattr(knn, "MOST_COLUMNS_OF_PANEL", most_columns)
    first, second = torch.randn(2, *shape)
    second[:, : shape[1] // 3] = 3 + 1e-5 * second[:, : shape[1] // 3]  # all searches run
    queries = [None, None]
    if n_queries:
        queries = torch.randn(2, shape[0], n_queries, shape[2])
    for measure_all in (True, True, False, False):
        nearest_triton(first, k, measure_all, queries[0])
    expected = [_nearest(second, queries[1], k, measure_all) for measure_all in (True, False)]
    assert not repetitions
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(77))
    for measure_all, result in zip((True, False), expected, strict=True):
        assert equal(nearest_triton(second, k, measure_all, queries[1]), result)
    assert len(repetitions) == 2


def test_layouts(repetitions):
    """A call whose input lies otherwise has a plan of its own."""
    memory = torch.randn(2 * 40 * 8 + 1)
    layouts = [
        memory[:320].view(1, 40, 8),
        memory[4:324].view(1, 40, 8),  # has the plan of the first
        memory[1:321].view(1, 40, 8),
        memory[:320].view(1, 8, 40).mT,
        memory[:640].view(1, 40, 16)[..., :8],
        memory[:320].view(1, 40, 8).half(),
        memory[:640].view(2, 40, 8),
    ]
    for x in layouts[2:] + 2 * layouts[:1]:
        nearest_triton(x, 3, True)
    for count, x in enumerate(layouts):
        assert equal(nearest_triton(x, 3, True), _nearest(x, None, 3, True))
        assert len(repetitions) == min(count + 1, 2)
    for x in layouts:
        assert equal(nearest_triton(x, 3, True), _nearest(x, None, 3, True))
    assert len(repetitions) == 2 + len(layouts)
    assert len(set(repetitions)) == len(layouts) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_aggregate(dtype, repetitions):
    values, features = (torch.randn(2, 40, 9).to(dtype) for _ in range(2))
    floor, settings = torch.full((2,), 0.1), (3.0, 1e-6)
    for _ in range(3):
        for f in (features, values):
            expected = _aggregate(values, f, floor, *settings)
            assert equal(aggregate_triton(values, f, floor, *settings), expected)
        assert torch.equal(mean_similarity_triton(features), _mean_similarity(features)[0])
    assert len(repetitions) == 3


def with_a_sum(x, k):
    return _nearest(x + x.sum(), None, k, True)


def test_no_plan(repetitions):
    """Operations of torch are not repeated, and inputs that share memory cannot be told apart."""
    for _ in range(3):
        x = torch.randn(1, 40, 8)
        found = _plan.planned(with_a_sum, (x,), (3,))
        assert equal(found, with_a_sum(x, 3)) and not repetitions
        found = nearest_triton(x, 3, True, x[:, :7])
        assert equal(found, _nearest(x, x[:, :7], 3, True)) and not repetitions
    x, queries = torch.randn(1, 40, 8), torch.randn(1, 40, 8)
    assert equal(nearest_triton(x, 3, True, queries[:, :7]), _nearest(x, queries[:, :7], 3, True))


@pytest.mark.parametrize("n, n_queries", [(51, None), (40, 51), (51, 40)])
def test_many_tokens_have_no_plan(n, n_queries, repetitions, monkeypatch):
    """The workspaces of all passes would be held at once."""
    monkeypatch.setattr(knn, "MOST_PLANNED_TOKENS", 100)
    x = torch.randn(2, n, 8)
    queries = None if n_queries is None else torch.randn(2, n_queries, 8)
    for _ in range(3):
        nearest_triton(x, 3, True, queries)
    monkeypatch.setattr(aggregate, "WORKSPACE_BYTES", 2**17)  # a panel of 128 x 128 float32 is 2^16
    floor = torch.full((2,), 0.1)
    for _ in range(3):
        aggregate_triton(x.repeat(2, 1, 1), x.repeat(2, 1, 1), floor.repeat(2), 3.0, 1e-6)
    assert not repetitions
    for _ in range(3):
        aggregate_triton(x, x.clone(), floor, 3.0, 1e-6)
    assert len(repetitions) == 1


def test_a_capture_records_no_plan(repetitions, monkeypatch):
    x = torch.randn(1, 40, 8)
    expected = _nearest(x, None, 3, True)
    monkeypatch.setattr(_run, "capturing", lambda device: True)
    monkeypatch.setattr(_run, "_require_loaded", lambda *launch: None)
    for _ in range(3):
        assert equal(nearest_triton(x, 3, True), expected)
    assert not repetitions
    monkeypatch.setattr(_run, "capturing", lambda device: False)
    for _ in range(3):
        assert equal(nearest_triton(x, 3, True), expected)
    assert len(repetitions) == 1


def test_threads(repetitions):
    x = torch.randn(6, 1, 40, 8)
    expected = [_nearest(image, None, 3, True) for image in x]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: nearest_triton(x[i % 6], 3, True), range(24)))
    assert all(equal(result, expected[i % 6]) for i, result in enumerate(found))
    assert len(repetitions) >= 12


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 5184, 64), (64, 196, 32), (3, 40, 8)])
def test_on_the_gpu(shape):
    """All of many calls give the bits of the launches, each on tokens of its own."""
    tokens = torch.randn(6, *shape, device="cuda")
    expected = [_nearest(x, None, 9, False) for x in tokens]
    for x, result in zip(tokens, expected, strict=True):
        assert equal(nearest_triton(x.clone(), 9, False), result)
    floor, settings = torch.full(shape[:1], 0.1, device="cuda"), (3.0, 1e-6)
    for x in tokens.half():
        expected = _aggregate(x.clone(), x, floor, *settings)
        assert equal(aggregate_triton(x.clone(), x, floor, *settings), expected)
