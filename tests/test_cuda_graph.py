"""CUDA graphs: nothing in the ops or the calibrated forward waits for the GPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_clip import tiny_clip
from tiny_sam3 import ALL, SIDE, tiny_sam3

import scclip_fast as sf
from scclip_fast.clip import SCCLIP
from scclip_fast.kernels import _launch, _run
from scclip_fast.sam3 import calibrate

on_gpu = pytest.mark.gpu

FIRST_CALL = """
import torch
import scclip_fast as sf
x = torch.randn(1, 300, 64, device="cuda")
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        sf.aggregate(x, x)
except RuntimeError as error:
    print(error)
expected, graph = sf.aggregate(x, x), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = sf.aggregate(x, x)
graph.replay()
print(torch.equal(out, expected))
"""


@on_gpu
def test_first_call_in_a_capture_is_refused():
    """A capture fails in a new process, where no kernel is loaded; after a call it works."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    refusal, equal = done.stdout.splitlines()
    assert "before capturing" in refusal and equal == "True"


class Kernel:
    """Stands in for a jit function of Triton in `Launch.run`."""

    def __init__(self, module):
        self.__name__ = "_kernel"
        self.module, self.runs, self.fn = module, 0, object()

    def warmup(self, **_):
        return SimpleNamespace(module=self.module)

    def __getitem__(self, grid):
        def run(**_):
            self.runs += 1

        return run


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("module", [None, "loaded"])
@pytest.mark.parametrize("keeps", [False, True])
def test_only_what_is_loaded_is_captured(capturing, module, keeps, monkeypatch):
    monkeypatch.setattr(_run, "keeps_compiled", lambda device: keeps)
    monkeypatch.setattr(_run, "capturing", lambda device: capturing)
    kernel = Kernel(module)
    launch = _launch.Launch(kernel, 1, x=torch.zeros(1))
    if capturing and module is None:
        with pytest.raises(RuntimeError, match=r"_kernel .* before capturing"):
            launch.run()
    else:
        launch.run()
    assert kernel.runs == (not capturing or module is not None)


def replayed(call, first, second):
    """Output of a graph of `call` for the input `second`, when it was captured with `first`."""
    static = first.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles
            call(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(static)
    static.copy_(second)
    graph.replay()
    return out


@on_gpu
@pytest.mark.parametrize("tokens", [196, 2304])  # either search
def test_lof_scores(tokens):
    x = torch.randn(2, 1, tokens, 64, device="cuda")
    assert torch.equal(replayed(sf.lof_scores, *x), sf.lof_scores(x[1]))


@on_gpu
def test_aggregate():
    x = torch.randn(2, 1, 300, 64, device="cuda")
    features = torch.randn(1, 300, 48, device="cuda")

    def call(values):
        return sf.aggregate(values, features)

    assert torch.equal(replayed(call, *x), call(x[1]))


@on_gpu
def test_blended_attention():
    q = torch.randn(2, 1, 4, 300, 16, device="cuda")
    features = torch.randn(1, 300, 48, device="cuda")

    def call(q):
        return sf.blended_attention(q, q, q, features)

    assert torch.equal(replayed(call, *q), call(q[1]))


@on_gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_repair(backend):
    tokens = torch.randn(2, 1, 300, 64, device="cuda")
    mask = torch.rand(1, 300, device="cuda") < 0.3

    def call(tokens):
        return sf.repair(tokens, mask, (15, 20), backend=backend)

    assert torch.equal(replayed(call, *tokens), call(tokens[1]))


@on_gpu
def test_calibrated_forward():
    encoder = SCCLIP(tiny_clip().cuda()).eval()
    images = torch.randn(2, 2, 3, 96, 96, device="cuda")
    with torch.no_grad():
        assert torch.equal(replayed(encoder, *images), encoder(images[1]))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibrated_trunk_of_sam3(dtype):
    model = tiny_sam3().to("cuda", dtype)
    images = torch.randn(2, 2, 3, SIDE, SIDE, device="cuda", dtype=dtype)

    def encode(pixels):
        return model.vision_encoder(pixels).last_hidden_state

    with torch.no_grad(), calibrate(model, ALL):
        assert torch.equal(replayed(encode, *images), encode(images[1]))
