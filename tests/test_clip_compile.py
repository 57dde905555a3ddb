"""The calibrated model under torch.compile and torch.export."""

import pytest
import torch
from tiny_clip import images, tiny_clip

from scclip_fast.clip import METHODS, SCCLIP

GRIDS = {"native": (32, 32), "rectangle": (24, 36), "resized": (30, 45)}


@pytest.fixture(autouse=True)
def no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def encoder(method="scclip"):
    return SCCLIP(tiny_clip(layers=3), method=method)


@pytest.mark.parametrize("size", GRIDS.values(), ids=GRIDS)
def test_compile_fullgraph(size):
    model, x = encoder(), images(2, *size)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_one_graph(method):
    model, x = encoder(method), images(2, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_a_dynamic_batch(dynamic):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    model = encoder()
    compiled = torch.compile(model, fullgraph=True, backend=keep, dynamic=dynamic)
    for batch in (2, 3, 5, 6):
        x = images(batch, 24, 36)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == (1 if dynamic else 2)  # one graph for the first batch, one for all others


@pytest.mark.parametrize("size", GRIDS.values(), ids=GRIDS)
def test_export_with_a_dynamic_batch(size):
    model = encoder()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (images(2, *size),), dynamic_shapes=({0: batch},))
    # quantile is data-dependent in one version of torch and has no symbolic sizes in another.
    assert not [node for node in program.graph.nodes if "quantile" in str(node.target)]
    for count in (2, 5):
        x = images(count, *size)
        torch.testing.assert_close(program.module()(x), model(x))
