"""The choice of templates by entropy, against the rule written out for each template and class."""

import pytest
import torch
from tiny_clip import photo, tiny_clip, tokenizer

from scclip_fast.clip import SCCLIP
from scclip_fast.segment import Segmenter, choose_templates

CLASSES = ["sky", "person, man", "tree", "water"]
TEMPLATES = ["a {}.", "a photo of the {}.", "art of {}", "many {}s", lambda name: f"no {name}"]
SETTINGS = dict(short_side=48, slide_crop=32, slide_stride=16, logit_scale=20.0)


@pytest.fixture(scope="module")
def encoder():
    return SCCLIP(tiny_clip(layers=3).double(), method="maskclip")


def entropy(encoder, images, template, index):
    """The mean entropy of the pixels of a class, with each name as a class and one template."""
    names = ["sky", "person", "man", "tree", "water"]
    segmenter = Segmenter(encoder, tokenizer(), names, templates=[template], **SETTINGS)
    values = []
    for q in map(segmenter.probabilities, images):
        owners = torch.tensor([0, 1, 1, 2, 3])[q.argmax(dim=0)]
        values.append(-(q * q.log()).sum(dim=0)[owners == index])
    return torch.cat(values).double().mean().item()


@pytest.mark.parametrize("sizes", [[(60, 80)], [(60, 80), (48, 48), (90, 50)]], ids=["1", "3"])
def test_the_lowest_mean_entropies(encoder, sizes):
    images = [photo(*size) for size in sizes]
    chosen = choose_templates(
        encoder, tokenizer(), CLASSES, images, templates=TEMPLATES, n_experts=2, **SETTINGS
    )
    assert list(chosen) == ["sky", "person", "tree", "water"]
    found = 0
    for index, experts in enumerate(chosen.values()):
        means = {t: entropy(encoder, images, t, index) for t in TEMPLATES}
        means = {t: mean for t, mean in means.items() if mean == mean}  # NaN: no pixel
        assert experts == (sorted(means, key=means.__getitem__)[:2] or TEMPLATES)
        found += len(means)
    assert found > len(TEMPLATES)  # pixels of more than one class


def test_a_class_has_the_features_of_its_templates(encoder):
    """The mean of the captions' features, of both names of a class, and no other class's."""

    def features(templates):
        return Segmenter(encoder, tokenizer(), CLASSES, templates=templates).text_features

    by_class = {name: TEMPLATES[:2] for name in ("sky", "person", "tree", "water")}
    assert torch.equal(features(by_class), features(TEMPLATES[:2]))
    other = features(by_class | {"person": TEMPLATES[2:]})
    same = (other == features(TEMPLATES[:2])).all(dim=1)
    assert same.tolist() == [True, False, False, True, True]
    assert torch.equal(other[1:3], features(TEMPLATES[2:])[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_that_are_nowhere_and_other_dtypes(dtype):
    """A class that no template predicts keeps all templates."""
    encoder = SCCLIP(tiny_clip(layers=2).to(dtype), method="maskclip")
    chosen = choose_templates(
        encoder, tokenizer(), ["a", "b", "c", "d", "e", "f"], [torch.zeros(8, 8, 3).byte()],
        templates=TEMPLATES[:2], n_experts=1, short_side=None,
    )  # fmt: skip
    assert sorted(map(len, chosen.values()))[-1] == 2 and min(map(len, chosen.values())) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(images=[]), "images must have at least one image"),
        (dict(n_experts=6), r"n_experts must be in \[1, 5\], got 6"),
        (dict(n_experts=0), r"n_experts must be in \[1, 5\], got 0"),
        (dict(templates=["no place"]), "must have {} in the name's place"),
    ],
)
def test_what_is_refused(encoder, change, message):
    arguments = dict(images=[photo(32, 32)], templates=TEMPLATES) | change
    with pytest.raises(ValueError, match=message):
        choose_templates(encoder, tokenizer(), CLASSES, **arguments, **SETTINGS)


@pytest.mark.parametrize(
    "names", [["sky", "person", "tree"], ["sky", "person, man", "tree", "sea"]]
)
def test_templates_of_other_classes_are_refused(encoder, names):
    by_class = dict.fromkeys(names, TEMPLATES[:1])
    with pytest.raises(ValueError, match=r"an entry for each class, got none for .*water"):
        Segmenter(encoder, tokenizer(), CLASSES, templates=by_class)
    by_class = {name: ["none"] for name in ("sky", "person", "tree", "water")}
    with pytest.raises(ValueError, match=r"must have \{\} in the name's place"):
        Segmenter(encoder, tokenizer(), CLASSES, templates=by_class)
