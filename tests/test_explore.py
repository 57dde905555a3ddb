"""The results that the page of `scclip-fast app` shows, without a browser."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from scclip_fast.app.explore import Explorer
from scclip_fast.clip import SCCLIP, create_model
from scclip_fast.clip.tower import Tower
from scclip_fast.scenes.draw import scene
from scclip_fast.segment import Segmenter

NAMES = ["grass", "red circle", "brick"]


@pytest.fixture(scope="module")
def model():
    return create_model("scenes")


def test_variants_share_one_pass_and_equal_single_runs(model, monkeypatch):
    encoder, tokenizer = model
    passes, original = [], Tower.block_outputs

    def block_outputs(tower, images):
        passes.append(images.shape)
        return original(tower, images)

    monkeypatch.setattr(Tower, "block_outputs", block_outputs)
    explorer = Explorer(encoder, tokenizer, 112)
    for index in (18, 19):  # another photo replaces the first
        photo = Image.fromarray(scene("benchmark", index, (112, 128)).image)
        config = replace(explorer.config, beta=0.3)
        found = explorer.explore(photo, NAMES, config)
        assert len(passes) == 1
        passes.clear()
        assert found.variants[0].name == "SC-CLIP" and len(found.variants) == 7
        assert found.outliers.shape == found.scores.shape == found.variants[0].colours.shape[:2]
        alone = {"SC-CLIP": SCCLIP(encoder.model, config), "plain CLIP": SCCLIP(encoder.model)}
        alone["plain CLIP"].method = "clip"
        for variant in found.variants[:2]:
            single = Segmenter(
                alone[variant.name], tokenizer, NAMES, slide_crop=None, short_side=112
            )
            assert np.array_equal(variant.labels, single(photo).numpy())
        passes.clear()
