"""Forward mode and torch.func are right for ops that have them, and raise for the others."""

import pytest
import torch
from tolerance import assert_close
from torch.autograd import forward_ad

import scclip_fast as sf

MASK = torch.arange(20) % 3 == 0

#: Ops that have only reverse-mode derivatives, as functions of tokens (20, 4).
REVERSE = {
    "aggregate": lambda x: sf.aggregate(x, x, 0.2),
    "content_attention": lambda x: sf.content_attention(x, x),
    "repair": lambda x: sf.repair(x, MASK, (4, 5)),
    "blended_attention": lambda x: sf.blended_attention(x[None], x[None], x[None], x),
}
#: Ops with all derivatives.
SMOOTH = {
    "similarity": lambda x, **b: sf.similarity(x, 0.2, **b),
    "adaptive_aggregate": lambda x, **b: sf.adaptive_aggregate(x, (x @ x.mT).exp(), **b),
}
#: Ops that are constant almost everywhere, or whose results are documented as constants.
CONSTANT = {
    "knn": lambda x: sf.knn(x, 3)[0],
    "lof_scores": lambda x: sf.lof_scores(x, 3),
    "lof_scores-breunig": lambda x: sf.lof_scores(x, 3, variant="breunig"),
    "upsampled_labels": lambda x: sf.upsampled_labels(x[None], (7, 9))[1],
}


def jvp(op, x, tangent):
    return torch.func.jvp(op, (x,), (tangent,))[1]


def dual(op, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(op(forward_ad.make_dual(x, tangent))).tangent


def inside_a_graph(op, x, tangent, **options):
    return torch.compile(lambda x: jvp(op, x, tangent), backend="aot_eager", **options)(x)


def around_a_graph(op, x, tangent):
    return jvp(torch.compile(op, backend="aot_eager"), x, tangent)


@pytest.mark.parametrize("mode", [jvp, dual, inside_a_graph, around_a_graph])
@pytest.mark.parametrize("name", REVERSE)
def test_forward_mode_raises(name, mode):
    torch._dynamo.reset()
    message = f"{name} has no forward-mode derivative.*reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        mode(REVERSE[name], *torch.randn(2, 20, 4))


def test_each_argument_is_looked_at():
    x, tangent = torch.randn(2, 20, 4)
    q, t = x[None], tangent[None]
    calls = {
        "values": lambda d: sf.aggregate(d(x, tangent), x),
        "features": lambda d: sf.aggregate(x, d(x, tangent)),
        "tokens": lambda d: sf.repair(d(x, tangent), MASK, (4, 5)),
        "q": lambda d: sf.blended_attention(d(q, t), q, q, x),
        "k": lambda d: sf.blended_attention(q, d(q, t), q, x),
        "v": lambda d: sf.blended_attention(q, q, d(q, t), x),
        "content": lambda d: sf.blended_attention(q, q, q, d(x, tangent)),
    }
    for call in calls.values():
        with forward_ad.dual_level(), pytest.raises(NotImplementedError):
            call(forward_ad.make_dual)


@pytest.mark.parametrize("name", REVERSE)
def test_constants_pass_in_forward_mode(name):
    x = torch.randn(20, 4)
    with forward_ad.dual_level():
        assert torch.equal(REVERSE[name](x), REVERSE[name](x.clone()))


@pytest.mark.parametrize("name", REVERSE)
def test_reverse_mode_of_torch_func_raises(name):
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: REVERSE[name](x).sum())(torch.randn(20, 4))


@pytest.mark.parametrize("mode", [jvp, dual])
@pytest.mark.parametrize("name", SMOOTH)
def test_tangents(name, mode):
    x, tangent = torch.randn(2, 20, 4)
    exact = jvp(lambda x: SMOOTH[name](x, backend="reference"), x.double(), tangent.double())
    assert exact.any()
    assert_close(mode(SMOOTH[name], x, tangent), ref=exact)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("name", SMOOTH)
def test_tangents_are_not_lost_in_a_graph(name):
    """The graph breaks, or compilation fails if the graph must not break."""
    torch._dynamo.reset()
    x, tangent = torch.randn(2, 20, 4)
    found = inside_a_graph(SMOOTH[name], x, tangent)
    assert_close(found, ref=jvp(SMOOTH[name], x.double(), tangent.double()))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        inside_a_graph(SMOOTH[name], x, tangent, fullgraph=True)


@pytest.mark.parametrize("name", SMOOTH)
def test_torch_func(name):
    def loss(x, **backend):
        return SMOOTH[name](x, **backend).square().sum()

    def exact(x):
        return loss(x, backend="reference")

    x = torch.randn(12, 3)
    assert_close(torch.func.grad(loss)(x), ref=torch.func.grad(exact)(x.double()))
    assert_close(torch.func.hessian(loss)(x), ref=torch.func.hessian(exact)(x.double()))


@pytest.mark.parametrize("name", [*REVERSE, *SMOOTH, *CONSTANT])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(name):
    op, x = (REVERSE | SMOOTH | CONSTANT)[name], torch.randn(3, 20, 4)
    torch.testing.assert_close(torch.vmap(op)(x), torch.stack([op(tokens) for tokens in x]))


@pytest.mark.parametrize("name", CONSTANT)
def test_constants_have_no_tangent(name):
    x, tangent = torch.randn(2, 20, 4)
    assert not jvp(CONSTANT[name], x, tangent).any()
    assert dual(CONSTANT[name], x, tangent) is None
