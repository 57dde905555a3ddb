"""The presets, the settings and models that are refused, and open_clip's loader."""

import json
import math
from dataclasses import replace

import huggingface_hub.constants as hub
import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from tiny_clip import TEXT, VISION, tiny_clip
from torch import nn

from scclip_fast.clip import SCCLIP, SCCLIPConfig, create_model, loading
from scclip_fast.sam3 import Sam3CalibrationConfig

MODEL = "ViT-tiny-test"
CONFIG = dict(embed_dim=24, vision_cfg=VISION, text_cfg=TEXT)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Registers the tiny model with two tags in open_clip, without hub and cache."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, MODEL, CONFIG)
    tags = {
        tag: open_clip.pretrained._pcfg(hf_hub="someone/tiny/", quick_gelu=quick)
        for tag, quick in (("openai", True), ("laion", False))
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, MODEL, tags)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    url = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", url)


@pytest.fixture
def cached(offline, tmp_path):
    """Stores the weights of both tags in the hub's cache."""
    weights = tiny_clip().state_dict()
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(weights, snapshot / "open_clip_model.safetensors")
    return weights


def test_published_presets():
    def indices(c):
        return c.pre_adjust_idx, c.post_adjust_idx, c.multi_start_idx, c.multi_end_idx, c.res_cls

    base, large = SCCLIPConfig.for_depth(12), SCCLIPConfig.for_depth(24)
    assert base == SCCLIPConfig()
    assert indices(base) == (8, 3, 3, 10, 0.3)
    assert indices(large) == (16, 6, 8, 19, 0.1)
    common = dict(
        outlier_n_neighbors=30,
        outlier_contamination=0.05,
        outlier_score="lof",
        beta=0.4,
        gamma=3.0,
        alpha=0.5,
        self_attention="kk",
        repair=True,
        pre_aggregate=True,
        content_attention=True,
        post_aggregate=True,
        multi_level=True,
    )
    for name, value in common.items():
        assert getattr(base, name) == getattr(large, name) == value, name


def test_presets_of_other_depths():
    for layers in range(2, 49):
        config = SCCLIPConfig.for_depth(layers)
        config.check(layers)
        published = SCCLIPConfig.for_depth(12 if layers < 18 else 24)
        depth = 12 if layers < 18 else 24
        for name in ("pre_adjust_idx", "post_adjust_idx"):  # in finished blocks
            wanted = (getattr(published, name) + 1) * layers / depth
            assert math.isclose(getattr(config, name) + 1, wanted, abs_tol=1)
    assert SCCLIPConfig.for_depth(32).multi_end_idx == 25  # ViT-H; 19 of 24 blocks is 25 of 32
    with pytest.raises(ValueError, match="at least 2 blocks, got a tower of 1"):
        SCCLIPConfig.for_depth(1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(pre_adjust_idx=11), r"pre_adjust_idx must be in \[0, 10\] for 12 blocks, got 11"),
        (dict(pre_adjust_idx=-1), "pre_adjust_idx must"),
        (dict(post_adjust_idx=11), "post_adjust_idx must"),
        (dict(multi_start_idx=-1), "multi_start_idx must"),
        (dict(multi_start_idx=4, multi_end_idx=4), r"multi_end_idx must be in \[5, 11\]"),
        (dict(multi_end_idx=12), "multi_end_idx must"),
        (dict(self_attention="qq"), "self_attention must be 'kk' or 'qk', got 'qq'"),
        (dict(outlier_n_neighbors=0), "outlier_n_neighbors must be at least 1, got 0"),
        (dict(outlier_contamination=3), r"outlier_contamination must be in \(0, 0.5\], got 3"),
        (dict(outlier_score="l2"), "outlier_score must be 'lof', 'norm' or 'either', got 'l2'"),
        (dict(beta=math.nan), "beta must be a finite number in .*, got nan"),
        (dict(res_cls=math.inf), "res_cls must be a finite number in .*, got inf"),
        (dict(gamma=-1), r"gamma must be a finite number in \[0, inf\], got -1"),
        (dict(alpha=7), r"alpha must be a finite number in \[0, 1\], got 7"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        SCCLIP(tiny_clip(), replace(SCCLIPConfig(), **changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(outlier_n_neighbors=30.0), "outlier_n_neighbors must be an int, got float"),
        (dict(beta="0.4"), "beta must be a number, got str"),
        (dict(multi_level=1), "multi_level must be True or False, got 1"),
    ],
    ids=str,
)
def test_settings_of_another_type(changed, message):
    with pytest.raises(TypeError, match=message):
        SCCLIP(tiny_clip(), replace(SCCLIPConfig(), **changed))


RESNET = dict(layers=(1, 1, 1, 1), width=16, head_width=16, image_size=32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_clip(**RESNET), "open_clip's ModifiedResNet, which is convolutional"),
        (lambda: tiny_clip(layers=2, attentional_pool="parallel"), "second attention pooling"),
        (lambda: tiny_clip(layers=2, qk_norm=True), "got CustomResidualAttentionBlock"),
        (lambda: tiny_clip(layers=1), "at least 2 blocks"),
        (lambda: nn.Linear(1, 1), r"open_clip or transformers, got torch\.nn\..*\.Linear"),
    ],
    ids=["resnet", "two-pools", "qk-norm", "one-block", "no-clip"],
)
def test_towers_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        SCCLIP(make())


def assert_weights(encoder, weights):
    state = encoder.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion", False)])
def test_weights_bring_their_activation(cached, tag, quick):
    """The model's name does not mention QuickGELU; open_clip itself would only warn."""
    encoder, tokenizer = create_model(MODEL, tag, method="sclip")
    blocks = encoder.model.visual.transformer.resblocks
    assert all(isinstance(block.mlp.gelu, QuickGELU) == quick for block in blocks)
    assert_weights(encoder, cached)
    assert encoder.method == "sclip" and encoder.config == SCCLIPConfig()
    assert not any(module.training for module in encoder.model.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert tokenizer(["a cat", "a dog"]).shape == (2, 77)


def test_weights_from_a_file(offline, tmp_path):
    weights = tiny_clip(layers=12).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    config = replace(SCCLIPConfig(), beta=0.3)
    encoder, _ = create_model(MODEL, str(tmp_path / "weights.safetensors"), config=config)
    assert_weights(encoder, weights)
    assert encoder.config == config


@pytest.mark.parametrize("name", ["damaged.safetensors", "damaged.pt"])
def test_a_file_that_is_no_weights(offline, tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=f"cannot load {MODEL} ") as error:
        create_model(MODEL, str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_weights_of_another_model(offline, tmp_path):
    save_file(tiny_clip(layers=3).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(RuntimeError, match=f"cannot load {MODEL} ") as error:
        create_model(MODEL, str(tmp_path / "other.safetensors"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_fp16", "pure_bf16"])
def test_precisions(offline, precision):
    encoder, _ = create_model(MODEL, precision=precision)
    dense = encoder.encode_dense(torch.rand(2, 3, 40, 32))
    assert dense.dtype == (torch.float16 if "fp16" in precision else torch.bfloat16)
    assert dense.isfinite().all()
    assert encoder.model.visual.ln_post.weight.dtype == (
        dense.dtype if precision.startswith("pure") else torch.float32
    )


def test_a_name_that_open_clip_lacks():
    with pytest.raises(ValueError, match=r"'ViT-B-16-quickgel'; .*ViT-B-16-quickgelu"):
        create_model("ViT-B-16-quickgel", "openai")
    with pytest.raises(ValueError, match=r"unknown model 'x'; open_clip has .*ViT-L-14"):
        create_model("x")


def test_a_tag_that_open_clip_lacks(offline):
    with pytest.raises(ValueError, match=f"{MODEL} has no weights 'opnai'; .* openai, laion"):
        create_model(MODEL, "opnai")


@pytest.mark.parametrize("name", ["scenes", "local-dir:somewhere", "hf-hub:someone/tiny"])
def test_names_that_bring_their_weights(name):
    with pytest.raises(ValueError, match="pretrained must be None, got 'openai'"):
        create_model(name, "openai")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RuntimeError, match="cannot load local-dir:") as error:
        create_model(f"local-dir:{tmp_path / 'nowhere'}")
    assert "\n" not in str(error.value)


def test_a_hub_out_of_reach(offline):
    """The error is one line with the reason, without a long wait for retries."""
    with pytest.raises(RuntimeError, match=f"^cannot download {MODEL} openai: .+") as error:
        create_model(MODEL, "openai")
    assert "\n" not in str(error.value)


def test_a_hub_out_of_reach_is_asked_once(offline, monkeypatch):
    def download(config):
        raise AssertionError("open_clip would try again and again")

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    reason = loading.fetch_weights(MODEL, "openai")
    assert reason and "again" not in reason


@pytest.mark.parametrize("kind", [SCCLIPConfig, Sam3CalibrationConfig])
def test_settings_as_json(kind):
    config = replace(kind.for_depth(20), gamma=2.5, outlier_score="norm")
    again = kind.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    assert eval(repr(config)) == config
    assert kind.from_dict({"gamma": 2.5}) == replace(kind(), gamma=2.5)
    with pytest.raises(ValueError, match=r"settings must be of .*gamma, .*; got 'magic'"):
        kind.from_dict({"gamma": 2.5, "magic": 1})
