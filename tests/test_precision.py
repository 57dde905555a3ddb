"""Results do not depend on the precision that torch allows float32 products, nor on autocast."""

import threading
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from coarse_products import NEWER, coarse, coarse_products, reset, settings
from tolerance import assert_close
from torch.backends.cuda import matmul

import scclip_fast as sf
from scclip_fast import distributed
from scclip_fast.chunked.attention import plain_attention
from scclip_fast.precision import true_float32
from scclip_fast.sklearn.metrics import nearest

CPU_AUTOCAST = [torch.bfloat16, torch.float16]
BACKENDS = ["torch", "reference"]


def tight_clusters():
    """Tokens (1, 160, 8) whose distances within a cluster differ by less than TF32's rounding."""
    centers = 10 * torch.randn(4, 8)
    return (centers.repeat_interleave(40, dim=0) + 0.02 * torch.randn(160, 8))[None]


def near_queries():
    """Arguments of `nearest`: clusters, k, the metric, and queries within the clusters."""
    rows = tight_clusters()[0]
    return rows, 20, "euclidean", rows + 0.02 * torch.randn_like(rows)


def tokens(*widths):
    return [torch.randn(2, 40, width) for width in widths]


def heads(width):
    return [*torch.randn(3, 2, 3, 40, width), torch.randn(2, 40, 8)]


#: Ops with a gradient: (function, its inputs).
SMOOTH = {
    "aggregate": (lambda v, f, **b: sf.aggregate(v, f, 0.2, **b), lambda: tokens(6, 8)),
    "content_attention": (lambda v, f, **b: sf.content_attention(v, f, **b), lambda: tokens(6, 8)),
    "similarity": (lambda f, **b: sf.similarity(f, 0.2, **b), lambda: tokens(8)),
    "products": (lambda f, **b: sf.similarity(f, 0.2, False, **b), lambda: tokens(8)),
    "adaptive_aggregate": (sf.adaptive_aggregate, lambda: [*tokens(8), torch.rand(2, 40, 40)]),
    "blended_attention": (sf.blended_attention, lambda: heads(8)),
    "repair": (
        lambda x, **b: sf.repair(x, torch.arange(80).view(2, 40) % 3 == 0, (5, 8), **b),
        lambda: tokens(8),
    ),
}
OPS = SMOOTH | {
    "knn": (lambda x, **b: sf.knn(x, 20, **b), lambda: [tight_clusters()]),
    "lof_scores": (lambda x, **b: sf.lof_scores(x, 20, **b), lambda: [tight_clusters()]),
    "lof_scores-breunig": (
        lambda x, **b: sf.lof_scores(x, 20, variant="breunig", **b),
        lambda: [tight_clusters()],
    ),
    "outlier_mask": (lambda s, backend: sf.outlier_mask(s), lambda: [torch.rand(2, 40)]),
}

SETTINGS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(matmul, "allow_tf32", True),
}
if NEWER:
    SETTINGS |= {
        "cuda": lambda: setattr(matmul, "fp32_precision", "tf32"),
        "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        "generic": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    }


@pytest.fixture(autouse=True)
def products():
    torch._dynamo.reset()
    with coarse_products():
        yield


def flat(result):
    return result if isinstance(result, tuple) else (result,)


def assert_equal(found, expected):
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def gradients(op, inputs, upstream, forward=nullcontext, backward=nullcontext):
    leaves = [t.detach().requires_grad_() for t in inputs]
    with forward():
        out = op(*leaves)
    with backward():
        return torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_settings_make_products_coarse(setting):
    """If they did not, no test here could fail."""
    x = torch.randn(40, 8)
    fine = x @ x.T
    SETTINGS[setting]()
    assert coarse() and not torch.equal(x @ x.T, fine)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
class TestOps:
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_settings(self, name, backend, setting):
        op, inputs = OPS[name][0], OPS[name][1]()
        expected = op(*inputs, backend=backend)
        SETTINGS[setting]()
        before = settings()
        assert_equal(op(*inputs, backend=backend), expected)
        assert settings() == before

    @pytest.mark.parametrize("dtype", CPU_AUTOCAST)
    def test_autocast(self, name, backend, dtype):
        op, inputs = OPS[name][0], OPS[name][1]()
        expected = op(*inputs, backend=backend)
        with torch.autocast("cpu", dtype):
            assert_equal(op(*inputs, backend=backend), expected)
            assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype

    def test_compiled(self, name, backend):
        op, inputs = OPS[name][0], OPS[name][1]()
        expected = op(*inputs, backend=backend)
        torch.set_float32_matmul_precision("high")
        compiled = torch.compile(
            lambda *t: op(*t, backend=backend), fullgraph=True, backend="aot_eager"
        )
        assert_equal(compiled(*inputs), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(compiled(*inputs), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMOOTH)
class TestGradients:
    def setup(self, name, backend):
        function, inputs = SMOOTH[name][0], SMOOTH[name][1]()
        upstream = torch.randn_like(function(*inputs))
        return (lambda *t: function(*t, backend=backend)), inputs, upstream

    def test_setting_of_the_backward_pass(self, name, backend):
        arguments = self.setup(name, backend)
        expected = gradients(*arguments)
        torch.set_float32_matmul_precision("high")
        before = settings()
        assert_equal(gradients(*arguments), expected)
        assert settings() == before

    @pytest.mark.parametrize("around", ["forward", "backward"])
    def test_autocast(self, name, backend, around):
        arguments = self.setup(name, backend)
        expected = gradients(*arguments)
        context = {around: lambda: torch.autocast("cpu", torch.bfloat16)}
        assert_equal(gradients(*arguments, **context), expected)

    def test_compiled(self, name, backend):
        op, *arguments = self.setup(name, backend)
        expected = gradients(op, *arguments)
        torch.set_float32_matmul_precision("high")
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        assert_equal(gradients(compiled, *arguments), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
@pytest.mark.parametrize("name", ["wide heads", "similarity", "adaptive_aggregate"])
def test_what_triton_leaves_to_torch(name):
    op, inputs = (SMOOTH | {"wide heads": (sf.blended_attention, lambda: heads(72))})[name]
    inputs = inputs()
    expected = op(*inputs, backend="triton")
    torch.set_float32_matmul_precision("high")
    assert_equal(op(*inputs, backend="triton"), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(op(*inputs, backend="triton"), expected)


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "op",
    [
        lambda: distributed.knn(tight_clusters()[0], 20),
        lambda: distributed.lof_scores(tight_clusters()[0], 20),
        lambda: distributed.aggregate(torch.randn(40, 6), torch.randn(40, 8), 0.2),
        lambda: nearest(tight_clusters()[0], 20, "euclidean"),
        lambda: nearest(*near_queries()),
    ],
    ids=["knn", "lof_scores", "aggregate", "nearest", "nearest-queries"],
)
def test_outside_custom_ops(op, seed):
    def run():
        torch.manual_seed(seed)
        return op()

    expected = run()
    torch.set_float32_matmul_precision("high")
    assert_equal(run(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(run(), expected)


@pytest.mark.parametrize("width", [8, 72])
def test_attention_of_float32_on_a_gpu(width):
    """The plain form, which runs on GPUs alone, equals torch's attention."""
    q, k, v = torch.randn(3, 2, 40, width)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), scale=0.3
    )
    assert_close(plain_attention(q, k, v, scale=0.3), ref=expected)


class TestTheGuard:
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_settings_are_restored_after_an_exception(self, setting):
        @true_float32
        def fail(x):
            assert not coarse() and not torch.is_autocast_enabled("cpu")
            raise KeyError

        SETTINGS[setting]()
        before = settings()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError):
            fail(torch.ones(1))
        assert settings() == before
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError):
            fail(x=torch.ones(1))

    def test_a_device_without_autocast(self):
        """Devices without autocast, and arguments that are no tensors, reach the function."""
        assert true_float32(lambda x: x.device.type)(torch.ones(1, device="meta")) == "meta"
        assert true_float32(lambda x: x)("no tensor") == "no tensor"

    def test_nested(self):
        @true_float32
        def inner(x):
            return coarse()

        @true_float32
        def outer(x):
            return [inner(x), coarse()]

        torch.set_float32_matmul_precision("medium")
        before = settings()
        assert outer(torch.ones(1)) == [False, False]
        assert settings() == before

    @pytest.mark.parametrize("lowered", ["before", "between"])
    def test_threads(self, lowered):
        """No thread lowers the precision of another, whichever enters or leaves first."""
        entered, leave = threading.Event(), threading.Event()

        @true_float32
        def first(x):
            entered.set()
            leave.wait(10)

        @true_float32
        def second(x):
            before = coarse()
            leave.set()
            thread.join(10)
            return [before, coarse()]

        if lowered == "before":
            torch.set_float32_matmul_precision("high")
        thread = threading.Thread(target=first, args=(torch.ones(1),))
        thread.start()
        entered.wait(10)
        if lowered == "between":
            torch.set_float32_matmul_precision("high")
        assert second(torch.ones(1)) == [False, False]
        assert coarse()

    @pytest.mark.skipif(not NEWER, reason="torch 2.9's settings")
    def test_an_inherited_setting_stays_inherited(self):
        torch.backends.fp32_precision = "tf32"
        true_float32(lambda x: None)(torch.ones(1))
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"

    def test_the_default_is_left_alone(self):
        reset()
        if NEWER:
            before = settings()
            true_float32(lambda x: None)(torch.ones(1))
            assert settings() == before and "ieee" not in before


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestReferenceIsExact:
    """Results and gradients of the reference are those of float64, rounded once."""

    def test_results(self, name, dtype):
        op, inputs = SMOOTH[name][0], [t.to(dtype) for t in SMOOTH[name][1]()]
        doubles = [t.double() for t in inputs]
        exact = op(*doubles, backend="reference")
        assert_close(exact, ref=op(*doubles, backend="torch"))
        assert_equal(op(*inputs, backend="reference"), exact.to(dtype))

    def test_gradients(self, name, dtype):
        function, inputs = SMOOTH[name][0], [t.to(dtype) for t in SMOOTH[name][1]()]

        def op(*tensors):
            return function(*tensors, backend="reference")

        upstream = torch.randn_like(op(*inputs))
        exact = gradients(op, [t.double() for t in inputs], upstream.double())
        found = gradients(op, inputs, upstream)
        assert_equal(found, tuple(g.to(dtype) for g in exact))
