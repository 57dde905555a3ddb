"""CUDA graphs: nothing in the ops or the calibrated forward waits for the GPU."""

import pytest
import torch
from tiny_clip import tiny_clip
from tiny_sam3 import ALL, SIDE, tiny_sam3

import scclip_fast as sf
from scclip_fast.clip import SCCLIP
from scclip_fast.sam3 import calibrate

pytestmark = pytest.mark.gpu


def replayed(call, first, second):
    """What a graph of `call`, captured with one input, gives for another."""
    held = first.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles
            call(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(held)
    held.copy_(second)
    graph.replay()
    return out


@pytest.mark.parametrize("tokens", [196, 2304])  # either search
def test_lof_scores(tokens):
    x = torch.randn(2, 1, tokens, 64, device="cuda")
    assert torch.equal(replayed(sf.lof_scores, *x), sf.lof_scores(x[1]))


def test_aggregate():
    x = torch.randn(2, 1, 300, 64, device="cuda")
    features = torch.randn(1, 300, 48, device="cuda")

    def call(values):
        return sf.aggregate(values, features)

    assert torch.equal(replayed(call, *x), call(x[1]))


def test_blended_attention():
    q = torch.randn(2, 1, 4, 300, 16, device="cuda")
    features = torch.randn(1, 300, 48, device="cuda")

    def call(q):
        return sf.blended_attention(q, q, q, features)

    assert torch.equal(replayed(call, *q), call(q[1]))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_repair(backend):
    tokens = torch.randn(2, 1, 300, 64, device="cuda")
    mask = torch.rand(1, 300, device="cuda") < 0.3

    def call(tokens):
        return sf.repair(tokens, mask, (15, 20), backend=backend)

    assert torch.equal(replayed(call, *tokens), call(tokens[1]))


def test_calibrated_forward():
    encoder = SCCLIP(tiny_clip().cuda()).eval()
    images = torch.randn(2, 2, 3, 96, 96, device="cuda")
    with torch.no_grad():
        assert torch.equal(replayed(encoder, *images), encoder(images[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibrated_trunk_of_sam3(dtype):
    model = tiny_sam3().to("cuda", dtype)
    images = torch.randn(2, 2, 3, SIDE, SIDE, device="cuda", dtype=dtype)

    def encode(pixels):
        return model.vision_encoder(pixels).last_hidden_state

    with torch.no_grad(), calibrate(model, ALL):
        assert torch.equal(replayed(encode, *images), encode(images[1]))
