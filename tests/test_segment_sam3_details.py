"""Sam3Segmenter.details: presence, instances and semantic maps of each class."""

import pytest
import torch
from sam3_packages import PACKAGES, SIZE, Package, photo

from scclip_fast.segment import ClassDetails, Preview
from scclip_fast.segment.sam3_details import instances
from scclip_fast.segment.sam3_heads import Heads

CLASSES = ["sky", "tree, bush"]
CLOSE = 1e-5


@pytest.fixture(params=PACKAGES)
def package(request):
    package = Package(request.param)
    with package.unpinned():
        yield package


@pytest.mark.parametrize("presence", [True, False])
def test_details_are_the_heads_of_each_prompt(package, presence):
    model, image = package.model(), photo()
    segmenter = package.segmenter(CLASSES, model=model, presence=presence, prompts_per_pass=2)
    found = segmenter.details(image, min_score=0)
    assert [each.name for each in found] == ["sky", "tree"]
    for each, names in zip(found, (["sky"], ["tree", "bush"]), strict=True):
        out = [package.results(model, name, image) for name in names]
        most = max(float(o["presence"]) for o in out)
        assert each.presence == pytest.approx(most, abs=CLOSE) and not each.left_out
        scores = [o["scores"] * (o["presence"] if presence else 1) for o in out]
        scores, order = torch.cat(scores).sort(descending=True)
        assert torch.allclose(each.scores, scores, atol=CLOSE)
        pixels = torch.cat([o["boxes"] for o in out]) * torch.tensor([60, 40, 60, 40])
        assert torch.allclose(each.boxes, pixels[order], atol=1e-3)
        masks = torch.cat([o["masks"] for o in out])[order]
        doubtful = (masks - 0.5).abs() < CLOSE
        assert ((each.masks() == (masks > 0.5)) | doubtful).all()
        semantic = torch.stack([o["semantic"] for o in out]).max(dim=0).values
        assert torch.allclose(each.semantic, semantic, atol=CLOSE)
        assert each.size == tuple(semantic.shape) == each.masks().shape[1:]
        assert each.mask_bits.dtype == torch.uint8 and each.mask_bits.shape[2] == 32 // 8


def test_instances_below_the_score_are_dropped(package):
    segmenter = package.segmenter(CLASSES)
    everything = segmenter.details(photo(), min_score=0)
    threshold = float(everything[0].scores.median())
    for each, of_all in zip(segmenter.details(photo(), threshold), everything, strict=True):
        count = int((of_all.scores >= threshold).sum())
        assert torch.equal(each.scores, of_all.scores[:count])
        assert torch.equal(each.boxes, of_all.boxes[:count])
        assert torch.equal(each.masks(), of_all.masks()[:count])
    strict = segmenter.details(photo(), min_score=1)[0]
    assert strict.masks().shape == (0, *strict.size) and strict.semantic is not None


def test_classes_that_the_preview_leaves_out(package):
    segmenter = package.segmenter(CLASSES, preview=Preview(share=0.5))
    found = segmenter.details(photo(), min_score=0)
    [left] = [each for each in found if each.left_out]
    assert segmenter.left_out == [left.name]
    assert 0 < left.presence < 1 and left.semantic is None and len(left.scores) == 0
    assert left.boxes.shape == (0, 4) and left.masks().shape == (0, *left.size)


def test_bits_of_a_width_that_is_no_multiple_of_8():
    masks = torch.randn(1, 4, 3, 11)
    heads = Heads.of_logits(
        torch.zeros(1, 1), torch.zeros(1, 4), torch.rand(1, 4, 4), masks, torch.zeros(1, 1, 3, 11)
    )
    each = instances(heads, 0, 0.25, presence=True)
    assert torch.equal(each.scores, torch.full((4,), 0.25))
    fields = {name: value for name, value in vars(each).items() if name != "semantic"}
    details = ClassDetails(name="sky", left_out=False, semantic=None, **fields)
    assert torch.equal(details.masks(), masks[0] > 0) and details.mask_bits.shape == (4, 3, 2)
    assert len(instances(heads, 0, 0.26, presence=True).scores) == 0
    assert len(instances(heads, 0, 0.26, presence=False).scores) == 4


def test_arguments_that_are_refused(package):
    segmenter = package.segmenter(CLASSES)
    with pytest.raises(ValueError, match=r"min_score must be a finite number in \[0, 1\], got 2"):
        segmenter.details(photo(), min_score=2)
    with pytest.raises(TypeError, match="image must be a file, a PIL image"):
        segmenter.details(None)
    assert segmenter.details(photo()[:1, :1])[0].boxes.shape[1] == len(SIZE) + 2
