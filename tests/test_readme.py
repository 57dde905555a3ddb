"""The README's Python, run as it stands, with small models in the place of those it loads."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from copied_clip import copied, their_tokenizer
from test_cli_sam3 import tiny_processor
from tiny_clip import tiny_clip
from tiny_sam3 import tiny_sam3
from torch import distributed
from transformers import CLIPImageProcessor, CLIPProcessor

from scclip_fast import clip
from scclip_fast.scenes.draw import scene

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LOF = "From `lof_pytorch` to scclip_fast in one line"
OPEN_CLIP = "Calibrate your open_clip model"
SAM3 = "Calibrate SAM3"
OWN = "Write another calibration from the ops"
ANOMALIES = "Anomaly detection with a bank of tokens"
OPS = "Ops"


def blocks(title: str) -> list[str]:
    """The blocks of Python in the section of that title."""
    (text,) = (part for part in README.split("\n## ") if part.startswith(f"{title}\n"))
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(title: str, **names) -> dict:
    """Run the blocks of a section, one after the other, given some names; returns all names."""
    found = blocks(title)
    assert found
    for block in found:
        exec(compile(block, f"README.md, {title}", "exec"), names)
    return names


def stand_in(monkeypatch, **small) -> None:
    """Stands in for transformers' classes of these names, and loads the same model for any name."""
    for name, make in small.items():
        monkeypatch.setattr(
            getattr(transformers, name), "from_pretrained", lambda _, make=make: make()
        )


def test_every_block_is_run():
    tested = [
        block for title in (LOF, OPEN_CLIP, SAM3, OWN, ANOMALIES, OPS) for block in blocks(title)
    ]
    assert README.count("```python") == len(tested)


def test_lof_in_one_line():
    features = torch.randn(200, 32)
    features[7] += 20
    found = run(LOF, features=features)
    assert 7 in found["indices"] and found["scores"].argmax() == 7


def test_open_clip(monkeypatch):
    scenes = clip.create_model("scenes")
    monkeypatch.setattr(clip, "create_model", lambda name, pretrained: scenes)
    processor = CLIPProcessor(CLIPImageProcessor(), their_tokenizer())
    stand_in(monkeypatch, CLIPModel=lambda: copied(tiny_clip()), CLIPProcessor=lambda: processor)
    image = scene("validation", 0).image[:112]
    found = run(OPEN_CLIP, image=image, pixels=torch.randn(1, 3, 32, 48))
    assert found["labels"].shape == image.shape[:2]
    assert found["features"].shape[:3] == (
        1,
        32 // scenes[0].patch_size,
        48 // scenes[0].patch_size,
    )
    assert found["theirs"].text_features.shape[0] == 2
    assert not found["bolder"].config.multi_level and found["plain"].method == "clip"


def test_sam3(monkeypatch):
    stand_in(monkeypatch, Sam3Model=tiny_sam3, Sam3Processor=tiny_processor)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    with torch.inference_mode():
        output = run(SAM3, image=image)["output"]
    assert output.outlier_mask.any() and output.calibrated_features.isfinite().all()


def test_own_calibration():
    calibrate = run(OWN)["calibrate"]
    features = torch.randn(2, 9, 8, 16).requires_grad_()
    features.data[1, 4, 4] += 30
    calibrated = torch.compile(calibrate, fullgraph=True, backend="aot_eager")(features)
    assert torch.allclose(calibrated, calibrate(features), atol=1e-5)
    assert calibrated[1, 4, 4].norm() < 10
    calibrated.sum().backward()
    assert features.grad.isfinite().all()


def test_anomaly_detection():
    """Noise in one patch of a drawn scene, where the scene itself is in the bank."""
    images = [scene("train", i).image[:128, :128] for i in range(4)]
    normal = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    broken = normal[:1].clone()
    broken[..., 32:48, 48:64] = 3 * torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        found = run(ANOMALIES, normal_pixels=normal, pixels=broken)
    scores = found["scores"][0]
    assert scores.argmax() == 2 * 8 + 3  # of 8 x 8 patches
    assert scores.max() > 10 * scores.median()
    assert found["sparse"].shape == (1, 64) and found["sparse"].isfinite().all()


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_ops(process_group):
    features = 5 + torch.randn(200, 32)
    features[7] *= -1
    found = run(OPS, features=features, my_rows=features)
    assert found["labels"][7] == -1 and found["scores"].argmax() == 7
