"""The ops under torch.compile, torch.export and torch.library.opcheck."""

import pytest
import torch
from cases import GPU

import scclip_fast as sf
from scclip_fast.ops.aggregate import _weighted_mean_backward, weighted_mean
from scclip_fast.ops.attention import (
    _attention,
    _attention_backward,
    _blended_attention,
    _mean_similarity,
)
from scclip_fast.ops.knn import nearest
from scclip_fast.ops.lof import _lof_scores, _outlier_mask
from scclip_fast.ops.repair import _repair
from scclip_fast.ops.upsample import _upsampled_labels

GRID = (5, 8)

#: By op: a function of tensors with a batch dimension in front, and its inputs.
OPS = {
    "knn": (lambda x: sf.knn(x, 5), lambda: (torch.randn(3, 40, 8),)),
    "knn-queries": (
        lambda x, q: sf.knn(x, 5, q),
        lambda: (torch.randn(3, 40, 8), torch.randn(3, 7, 8)),
    ),
    "knn-cosine": (
        lambda x, q: sf.knn(x, 40, q, "cosine"),
        lambda: (torch.randn(3, 40, 8), torch.randn(3, 7, 8)),
    ),
    "knn-inner_product": (
        lambda x: sf.knn(x, 5, metric="inner_product"),
        lambda: (torch.randn(3, 40, 8),),
    ),
    "lof_scores": (lambda x: sf.lof_scores(x, 5), lambda: (torch.randn(3, 40, 8),)),
    "lof_scores-breunig": (
        lambda x: sf.lof_scores(x, 5, variant="breunig"),
        lambda: (torch.randn(3, 40, 8),),
    ),
    "norm_scores": (lambda x: sf.norm_scores(x), lambda: (torch.randn(3, 40, 8),)),
    "outlier_mask": (lambda s: sf.outlier_mask(s, 0.1), lambda: (torch.rand(3, 40),)),
    "lof": (lambda x: sf.lof(x, 5), lambda: (torch.randn(3, 40, 8),)),
    "repair": (
        lambda x, m: sf.repair(x, m, GRID),
        lambda: (torch.randn(3, 40, 8), torch.rand(3, 40) < 0.2),
    ),
    "similarity": (lambda x: sf.similarity(x, 0.2), lambda: (torch.randn(3, 40, 8),)),
    "aggregate": (
        lambda v, f: sf.aggregate(v, f, 0.2),
        lambda: (torch.randn(3, 40, 6), torch.randn(3, 40, 8)),
    ),
    "content_attention": (
        lambda v, f: sf.content_attention(v, f, 10.0, ("mean", 1.2)),
        lambda: (torch.randn(3, 40, 6), torch.rand(3, 40, 8)),
    ),
    "adaptive_aggregate": (
        lambda x, s: sf.adaptive_aggregate(x, s),
        lambda: (torch.randn(3, 40, 8), torch.rand(3, 40, 40)),
    ),
    "blended_attention": (
        lambda q, k, v, f: sf.blended_attention(q, k, v, f),
        lambda: (*torch.randn(3, 3, 2, 40, 4), torch.randn(3, 40, 8)),
    ),
    "upsampled_labels": (
        lambda maps: sf.upsampled_labels(maps, (9, 11)),
        lambda: (torch.randn(3, 4, 5, 6),),
    ),
}


def flat(result):
    return result if isinstance(result, tuple) else (result,)


def assert_same(found, expected):
    for a, b in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPS)
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    op, inputs = OPS[name]
    tensors = inputs()
    # `lof` counts its outliers. A graph holds a size that depends on data only on request.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        assert_same(compiled(*tensors), op(*tensors))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lof_scores", "aggregate", "blended_attention"])
def test_compile_with_inductor(name):
    torch._dynamo.reset()
    op, inputs = OPS[name]
    tensors = inputs()
    assert_same(torch.compile(op, fullgraph=True)(*tensors), op(*tensors))


@pytest.mark.parametrize(
    "name",
    [
        *("repair", "similarity", "aggregate", "adaptive_aggregate"),
        *("blended_attention", "content_attention"),
    ],
)
def test_compiled_gradients(name):
    torch._dynamo.reset()
    op, inputs = OPS[name]
    tensors = inputs()
    leaves = [t for t in tensors if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    out = op(*tensors)
    upstream = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, upstream)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(torch.autograd.grad(compiled(*tensors), leaves, upstream), expected)


@pytest.mark.parametrize("name", OPS)
def test_export_with_a_dynamic_batch(name):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return op(*tensors)

    op, inputs = OPS[name]
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        Module(), inputs(), dynamic_shapes=(({0: batch},) * len(inputs()),)
    )
    larger = tuple(torch.cat([t, t]) for t in inputs())
    assert_same(program.module()(*larger), op(*larger))


BACKENDS = ["torch", "reference", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
class TestOpcheck:
    """Schema, autograd registration, fake tensors and AOT dispatch of every registered op."""

    device = "cuda" if GPU else "cpu"

    def check(self, op, *args):
        torch.library.opcheck(op, args)

    def tensors(self, *shapes, grad=False):
        return [torch.randn(shape, device=self.device, requires_grad=grad) for shape in shapes]

    @pytest.mark.parametrize("variant", ["scclip", "breunig"])
    def test_lof_scores(self, backend, variant):
        (x,) = self.tensors((2, 20, 4))
        self.check(_lof_scores, x, 3, variant, backend)

    @pytest.mark.parametrize("metric", ["euclidean", "cosine", "inner_product"])
    def test_nearest(self, backend, metric):
        if backend == "triton" and metric == "inner_product":
            pytest.skip("the kernels do not rank by products")
        x, queries = self.tensors((2, 20, 4), (2, 7, 4))
        self.check(nearest, x, 20, backend, queries, metric)
        self.check(nearest, x, 5, backend, None, metric)

    def test_outlier_mask(self, backend):
        (scores,) = self.tensors((2, 40))
        self.check(_outlier_mask, scores, 0.1, backend)

    def test_repair(self, backend):
        (tokens,) = self.tensors((2, 20, 4), grad=True)
        mask = torch.rand(2, 20, device=self.device) < 0.3
        self.check(_repair, tokens, mask, 4, 5, backend)

    @pytest.mark.parametrize("classes", [3, 300])
    def test_upsampled_labels(self, backend, classes):
        (maps,) = self.tensors((2, classes, 3, 4))
        self.check(_upsampled_labels, maps, 5, 6, backend)

    @pytest.mark.parametrize("gamma", [None, 3.0])
    def test_weighted_mean(self, backend, gamma):
        values, features = self.tensors((2, 20, 4), (2, 20, 3), grad=True)
        floor = torch.full((2,), 0.1, device=self.device)
        self.check(weighted_mean, values, features, floor, gamma, backend)

    def test_mean_similarity(self, backend):
        (features,) = self.tensors((2, 20, 4))
        self.check(_mean_similarity, features, torch.float32, backend)

    def test_attention(self, backend):
        q, k, v, content = self.tensors(*[(2, 2, 20, 4)] * 4, grad=True)
        self.check(_attention, q, k, v, content, 0.5, 0.5, backend)


def test_opcheck_without_gradients():
    q, k, v = torch.randn(3, 2, 2, 20, 4)
    torch.library.opcheck(_blended_attention, (q, k, v, torch.rand(2, 20, 3), 3.0, 0.5, 0.5))


def test_opcheck_backward():
    values, features, grad = torch.randn(2, 20, 4), torch.randn(2, 20, 3), torch.randn(2, 20, 4)
    floor = torch.full((2,), 0.1)
    out, total = weighted_mean(values, features, floor, 3.0, "torch")
    torch.library.opcheck(_weighted_mean_backward, (grad, values, features, floor, 3.0, out, total))
    q, k, v, upstream = torch.randn(4, 2, 2, 20, 4)
    torch.library.opcheck(_attention_backward, (upstream, q, k, v, 0.5))


def test_a_scoped_backend_reaches_the_graph():
    """The backend is chosen during tracing and is an argument in the graph."""
    torch._dynamo.reset()
    seen = []

    def keep(graph, _):
        seen.extend(a for node in graph.graph.nodes for a in node.args if isinstance(a, str))
        return graph.forward

    x = torch.randn(1, 10, 4)
    compiled = torch.compile(lambda x: sf.aggregate(x, x), backend=keep, fullgraph=True)
    with sf.backend("reference"):
        compiled(x)
        compiled(x)
    assert seen == ["reference"]
    compiled(x)  # outside the scope, another graph
    assert seen == ["reference", "torch"]
