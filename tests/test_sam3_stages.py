"""Every stage of the SAM3 calibration equals plain code; all combinations of stages run."""

from dataclasses import replace
from itertools import product

import published_sam3
import pytest
import torch
from published_lof import lof_mask
from tiny_sam3 import GRID, LAYERS, NONE, QUERIES, SIDE, inputs, tiny_sam3

from scclip_fast.sam3 import Sam3CalibrationConfig, calibrate
from scclip_fast.sam3.config import STAGES, TRUNK_STAGES
from scclip_fast.sam3.stages import calibrate_queries

CLOSE = dict(rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def model():
    return tiny_sam3()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stages", published_sam3.TRUNKS)
@torch.no_grad()
def test_trunk(model, batch, stages):
    config = replace(NONE, residual_weight=0.4, **dict.fromkeys(stages, True))
    pixels = torch.randn(batch, 3, SIDE, SIDE)
    plain = [published_sam3.trunk(model.vision_encoder.backbone, image, config) for image in pixels]
    frozen = model.vision_encoder(pixels).last_hidden_state
    with calibrate(model, config):
        out = model.vision_encoder(pixels)
    expected = torch.stack([tokens for tokens, _ in plain])
    assert torch.allclose(out.last_hidden_state, expected, **CLOSE)
    assert torch.equal(out.calibrated_features, out.last_hidden_state)
    assert not torch.allclose(out.last_hidden_state, frozen, **CLOSE)
    if config.trunk_repair:
        mask = torch.stack([mask for _, mask in plain]).view(batch, GRID, GRID)
        assert torch.equal(out.outlier_mask, mask) and mask.any()
        assert out.lof_scores.shape == mask.shape
    else:
        assert out.outlier_mask is None and out.lof_scores is None


KEPT = {
    ("trunk_repair",): set(),
    ("trunk_aggregate",): {"pre", "post"},
    ("trunk_attention",): {"pre"},
    ("trunk_fusion",): {"level_sum"},
    TRUNK_STAGES: {"pre", "post", "level_sum"},
}


@pytest.mark.parametrize("stages", KEPT)
@torch.no_grad()
def test_what_is_kept_for_the_last_layer(model, stages):
    """Only tensors that a stage reads are kept, and one for the four middle layers together."""
    config = replace(NONE, multi_start_idx=1, multi_end_idx=5, **dict.fromkeys(stages, True))
    kept, outputs, layers = {}, [], model.vision_encoder.backbone.layers
    hooks = [layer.register_forward_hook(lambda *args: outputs.append(args[2])) for layer in layers]
    hooks.append(layers[-1].register_forward_pre_hook(lambda *_: kept.update(vars(state))))
    with calibrate(model, config):
        state = model.scclip
        model.vision_encoder(torch.randn(2, 3, SIDE, SIDE))
    for hook in hooks:
        hook.remove()
    kept = {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}
    assert set(kept) == KEPT[stages]
    tokens = [out.flatten(1, 2) for out in outputs]
    for name, index in dict(pre=config.pre_adjust_idx, post=config.post_adjust_idx).items():
        assert name not in kept or torch.equal(kept[name], tokens[index])
    assert "level_sum" not in kept or torch.equal(kept["level_sum"], sum(tokens[1:5]))


@torch.no_grad()
def test_trunk_alone_is_the_same_each_time(model):
    """A call after a failed one starts a new sum of the middle layers."""
    trunk, pixels = model.vision_encoder.backbone, torch.randn(1, 3, SIDE, SIDE)

    def fail(*_):
        raise RuntimeError("mine")

    with calibrate(model, replace(NONE, **dict.fromkeys(TRUNK_STAGES, True))):
        expected = trunk(pixels).last_hidden_state
        state = model.scclip
        assert state.pre is None and state.post is None and state.level_sum is None
        hook = trunk.layers[-2].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="mine"):
            trunk(pixels)
        hook.remove()
        assert torch.equal(trunk(pixels).last_hidden_state, expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layers", [(-1,), (0, 2)])
@torch.no_grad()
def test_queries(model, batch, layers):
    """Object queries are calibrated, and the presence token stays as it is."""
    config = replace(NONE, decoder_calibration=True, decoder_layers=layers, similarity_beta=0.1)
    given = inputs(batch)
    outputs = []
    hook = model.detr_decoder.layers[layers[0]].register_forward_hook(
        lambda _, args, out: outputs.append(out)
    )
    frozen = model(**given)
    with calibrate(model, config):
        out = model(**given)
    hook.remove()
    before, after = outputs
    expected = torch.stack([published_sam3.queries(hidden, config) for hidden in before])
    assert torch.allclose(after, expected, **CLOSE)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1:], before[:, 1:], **CLOSE)
    assert out.query_features.shape == (3, batch, QUERIES, 32)
    assert not torch.equal(out.pred_masks, frozen.pred_masks)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_cross_attention(model, batch):
    """Every layer of the DETR encoder averages its attention over similar tokens."""
    config = replace(NONE, cross_attention=True, similarity_beta=0.1, residual_weight=0.4)
    prompts, calls = inputs(batch), []
    frozen = model(**prompts)
    attentions = [layer.cross_attn for layer in model.detr_encoder.layers]
    hooks = [
        attention.register_forward_hook(
            lambda _, __, given, out: calls.append((given, out[0])), with_kwargs=True
        )
        for attention in attentions
    ]
    with calibrate(model, config):
        out = model(**prompts)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(attentions) == 2
    for attention, (given, attended) in zip(attentions, calls, strict=True):
        projections = [getattr(attention, f"{name}_proj") for name in "qkvo"]
        keep = given["attention_mask"].expand(batch, -1, -1, -1)[:, 0, 0]
        keep = keep if keep.dtype == torch.bool else keep == 0
        expected = [
            published_sam3.cross_attended(tokens, prompt, kept, projections, 4, config)
            for tokens, prompt, kept in zip(given["query"], given["key"], keep, strict=True)
        ]
        assert torch.allclose(attended, torch.stack(expected), **CLOSE)
        assert not keep.all()
    assert not torch.allclose(out.pred_masks, frozen.pred_masks, **CLOSE)
    with calibrate(model, replace(config, residual_weight=0.0)):
        assert torch.equal(model(**prompts).pred_masks, frozen.pred_masks)


@pytest.mark.parametrize("score", ["norm", "either"])
@pytest.mark.parametrize("stages", [("trunk_repair",), ("mask_repair",)])
@torch.no_grad()
def test_outlier_score(model, stages, score):
    config = replace(NONE, residual_weight=0.4, outlier_score=score, **dict.fromkeys(stages, True))
    given, embedded = inputs(2), {}
    head = model.mask_decoder
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: embedded.update({name: out}))
        for name, module in dict(q=head.mask_embedder, p=head.instance_projection).items()
    ]
    model(**given)
    for hook in hooks:
        hook.remove()
    with calibrate(model, replace(config, outlier_score="lof")):
        published = model(**given)
    with calibrate(model, config):
        out = model(**given)
    assert not torch.allclose(out.pred_masks, published.pred_masks, **CLOSE)
    if config.mask_repair:
        expected = [
            published_sam3.masks(q, p, config)
            for q, p in zip(embedded["q"], embedded["p"], strict=True)
        ]
        assert torch.allclose(out.pred_masks, torch.stack(expected), **CLOSE)
    else:
        plain = [
            published_sam3.trunk(model.vision_encoder.backbone, image, config)
            for image in given["pixel_values"]
        ]
        assert torch.equal(out.outlier_mask.flatten(1), torch.stack([mask for _, mask in plain]))
        tokens = torch.stack([tokens for tokens, _ in plain])
        assert torch.allclose(out.calibrated_features, tokens, **CLOSE)
        assert (out.lof_scores is None) == (score == "norm")


def test_queries_without_outliers():
    """Queries at equal distances have no outliers, so they stay as they are, though beta is low."""
    config = replace(NONE, similarity_beta=0.1)
    even = 1 + torch.eye(QUERIES)
    both = torch.stack([even, torch.randn(QUERIES, QUERIES)])
    out = calibrate_queries(both, config)
    assert torch.equal(out[0], even) and not torch.allclose(out[1], both[1], **CLOSE)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stages", [("mask_repair",), ("mask_threshold",), STAGES[-2:]])
@torch.no_grad()
def test_mask_head(model, batch, stages):
    config = replace(NONE, similarity_beta=0.05, **dict.fromkeys(stages, True))
    given, embedded = inputs(batch), {}
    head = model.mask_decoder
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: embedded.update({name: out}))
        for name, module in dict(q=head.mask_embedder, p=head.instance_projection).items()
    ]
    frozen = model(**given)
    for hook in hooks:
        hook.remove()
    with calibrate(model, config):
        out = model(**given)
    expected = [
        published_sam3.masks(q, p, config)
        for q, p in zip(embedded["q"], embedded["p"], strict=True)
    ]
    assert torch.allclose(out.pred_masks, torch.stack(expected), **CLOSE)
    assert not torch.allclose(out.pred_masks, frozen.pred_masks, **CLOSE)
    assert torch.equal(out.semantic_seg, frozen.semantic_seg)
    if config.mask_threshold:
        assert 0.05 < (out.pred_masks == 0).float().mean() < 0.95


@torch.no_grad()
def test_mask_repair_on_the_tokens(model):
    config = replace(NONE, mask_repair=True, mask_grid="tokens")
    given, calls = inputs(2), []
    hook = model.mask_decoder.pixel_decoder.register_forward_hook(
        lambda _, args, out: calls.append((args[0], out))
    )
    model(**given)
    with calibrate(model, config):
        model(**given)
    hook.remove()
    (maps, _), (_, decoded) = calls
    mask = lof_mask(maps[-1][0].flatten(1).T, 30, 0.05)
    repaired = published_sam3.repaired(maps[-1][0].flatten(1).T, mask, GRID, GRID)
    coarsest = torch.stack([repaired.T.view(-1, GRID, GRID)])
    first = [m[:1] for m in maps[:-1]]
    assert torch.allclose(
        decoded[:1], model.mask_decoder.pixel_decoder([*first, coarsest]), **CLOSE
    )


# All combinations of the other stages. cross_attention is on in every second one, because it shares
# no module with them.
SWITCHES = [
    (*others[:4], index % 2 == 0, *others[4:])
    for index, others in enumerate(product([False, True], repeat=len(STAGES) - 1))
]


@pytest.mark.parametrize("switches", [(False,) * len(STAGES), *SWITCHES])
@torch.no_grad()
def test_all_switches(model, switches):
    config = replace(NONE, **dict(zip(STAGES, switches, strict=True)))
    given = inputs(2)
    frozen = model(**given)
    with calibrate(model, config):
        out = model(**given)
    for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg"):
        actual, expected = getattr(out, name), getattr(frozen, name)
        assert actual.shape == expected.shape and actual.isfinite().all()
        if not any(switches):
            assert torch.equal(actual, expected)
    assert any(switches) == (not torch.equal(out.pred_masks, frozen.pred_masks))


@pytest.mark.parametrize("weight", [0.0, 1.0])
@torch.no_grad()
def test_residual_weight(model, weight):
    """The trunk is the frozen one at 0, bit for bit."""
    given = inputs(1)
    frozen = model(**given)
    config = replace(Sam3CalibrationConfig.for_depth(LAYERS), residual_weight=weight)
    with calibrate(model, config):
        out = model(**given)
    assert torch.equal(out.pred_masks, frozen.pred_masks) == (weight == 0)
    assert (out.calibrated_features is None) == (weight == 0)


@torch.no_grad()
def test_few_tokens_are_not_repaired(model):
    config = replace(NONE, trunk_repair=True, outlier_n_neighbors=64, decoder_calibration=True)
    with calibrate(model, config):
        out = model(**inputs(1))
    assert out.outlier_mask is None and out.pred_masks.isfinite().all()
