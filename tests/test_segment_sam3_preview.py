"""The preview of Sam3Segmenter, which chooses the classes that are decoded in full."""

import pytest
import torch
import torch.nn.functional as F
from sam3_packages import PACKAGES, Package, photo

from scclip_fast.segment import Preview

CLASSES = ["sky", "tree, bush", "car", "road", "sea"]
CLOSE = 1e-5


@pytest.fixture(params=PACKAGES)
def package(request):
    package = Package(request.param)
    with package.unpinned():
        yield package


def presences(package, model, image):
    """The presence of each class, that of its most present name, by the package's own calls."""
    return [
        max(
            float(package.results(model, name.strip(), image)["presence"])
            for name in synonyms.split(",")
        )
        for synonyms in CLASSES
    ]


def names(indices):
    return [CLASSES[index].partition(",")[0] for index in indices]


@pytest.mark.parametrize("share", [0.2, 0.41, 0.6])
def test_classes_with_the_least_presence_are_left_out(package, share):
    """At scale 1 the preview has the presence of the full pass, by which the classes are ranked."""
    model, image = package.model(), photo()
    expected = presences(package, model, image)
    ranked = sorted(range(5), key=lambda index: -expected[index])
    count = {0.2: 1, 0.41: 3, 0.6: 3}[share]
    whole = package.segmenter(CLASSES, model=model)
    segmenter = package.segmenter(CLASSES, model=model, preview=Preview(scale=1, share=share))
    full, previewed = whole.probabilities(image), segmenter.probabilities(image)
    assert segmenter.left_out == names(sorted(ranked[count:])) and whole.left_out == []
    for index in range(5):
        of_class = previewed[index + 1]
        if index in ranked[:count]:
            assert (of_class - full[index + 1]).abs().max() < CLOSE
        else:
            assert (of_class == 0).all()


def test_presence_of_the_coarser_grid(package):
    """The literal preview averages 2 x 2 tokens and leaves the finer levels as they are."""
    model, image = package.model(), photo()
    segmenter = package.segmenter(CLASSES, model=model, preview=Preview(scale=0.5, share=0.2))
    left_out = [each for each in segmenter.details(image) if each.left_out]
    assert len(left_out) == 4
    coarsened(package, model)
    expected = dict(zip(names(range(5)), presences(package, model, image), strict=True))
    for each in left_out:
        assert each.presence == pytest.approx(expected[each.name], abs=CLOSE)
    [decoded] = set(expected) - {each.name for each in left_out}
    assert decoded == max(expected, key=expected.get)


def coarsened(package, model):
    """Makes a model's encoder average its tokens over 2 x 2, with the positions of that grid."""
    if package.name == "transformers":
        neck = model.vision_encoder.neck

        def half(module, args, out):
            levels, positions = map(list, (out.fpn_hidden_states, out.fpn_position_encoding))
            levels[-2] = F.avg_pool2d(levels[-2], 2)
            shape = levels[-2].shape
            positions[-2] = neck.position_encoding(shape, levels[-2].device, levels[-2].dtype)
            out.fpn_hidden_states, out.fpn_position_encoding = tuple(levels), tuple(positions)
            return out

        model.vision_encoder.register_forward_hook(half)
        return
    backbone, image = model.backbone, model.backbone.forward_image

    def half(pixels):
        out = image(pixels)
        out["backbone_fpn"][-1] = F.avg_pool2d(out["backbone_fpn"][-1], 2)
        encoding = backbone.vision_backbone.position_encoding
        out["vision_pos_enc"][-1] = encoding(out["backbone_fpn"][-1])
        return out

    backbone.forward_image = half


def test_the_preview_is_cheap(package):
    """It runs the trunk no second time, and its prompts see a quarter of the tokens."""
    model, trunk, tokens = package.model(), [], []
    parts = package.parts(model)
    parts["trunk"].register_forward_hook(lambda *_: trunk.append(1))

    def count(_, args, kwargs):
        meta = "src" in kwargs
        tokens.append(
            kwargs["src"][0].shape[0] if meta else kwargs["vision_features"][0][0, 0].numel()
        )

    parts["prompts"].register_forward_pre_hook(count, with_kwargs=True)
    settings = dict(preview=Preview(scale=0.5, share=0.2), prompts_per_pass=6)
    package.segmenter(CLASSES, model=model, **settings)(photo())
    assert trunk == [1] and tokens == [16, 64]


def test_equal_presences_decode_the_class_named_first(package):
    same = ["1", "2"] if package.name == "transformers" else ["A", "¤"]
    for order in (same, same[::-1]):
        preview = Preview(share=0.5)
        segmenter = package.segmenter(order, preview=preview, prompts_per_pass=1)
        segmenter(photo())
        assert segmenter.left_out == [order[1]]
        segmenter.preview = None
        segmenter(photo())
        assert segmenter.left_out == []


CASES = [
    (Preview(share=0.2), 5, 1),
    (Preview(share=0.2), 6, 2),
    (Preview(share=0.2), 1000, 40),
    (Preview(share=0.07, most=50), 100, 7),
    (Preview(share=0.001), 3, 1),
    (Preview(share=1, most=2), 3, 2),
]


@pytest.mark.parametrize(("preview", "classes", "count"), CASES)
def test_number_of_classes(preview, classes, count):
    presence = torch.rand(classes).tolist()
    best = preview.best(presence)
    assert len(best) == count and best == sorted(best)
    assert min(presence[i] for i in best) >= max(
        (value for i, value in enumerate(presence) if i not in best), default=0
    )


WRONG = [
    (dict(scale=0), ValueError, r"scale must be in \(0, 1\], got 0"),
    (dict(scale=1.5), ValueError, r"scale must be in \(0, 1\], got 1.5"),
    (dict(share=-0.1), ValueError, r"share must be in \(0, 1\], got -0.1"),
    (dict(share="half"), TypeError, "share must be a number, got str"),
    (dict(most=0), ValueError, "most must be at least 1, got 0"),
    (dict(most=2.0), TypeError, "most must be an int, got float"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), WRONG)
def test_settings_that_are_refused(settings, kind, message):
    with pytest.raises(kind, match=message):
        Preview(**settings)
