"""Dtypes of Sam3Segmenter's model, and input that the segmenter refuses."""

import pytest
import torch
from sam3_packages import PACKAGES, Package, photo

from scclip_fast.clip.model import NotFiniteError
from scclip_fast.segment import Preview, Sam3Segmenter

CLASSES = ["sky", "tree, bush", "car"]
# The largest error of a probability, of float32 models with the same weights. The docstring of
# Sam3Segmenter states these numbers.
ERRORS = {torch.bfloat16: 0.01, torch.float16: 0.001}


@pytest.fixture(params=PACKAGES)
def package(request):
    package = Package(request.param)
    with package.unpinned():
        yield package


@pytest.fixture
def expected(package):
    return package.segmenter(CLASSES).probabilities(photo())


@pytest.mark.filterwarnings("ignore:Casting complex values")  # Meta's rotary embedding
@pytest.mark.parametrize("when", ["model before", "model after", "segmenter"])
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_cast_models(package, expected, dtype, when):
    """Without the cast of pixels, autocast or the restored rotations, this fails or is wrong."""
    model = package.model()
    if when == "model before":
        model.to(dtype)
    segmenter = package.segmenter(CLASSES, model=model, preview=Preview(scale=0.5, share=1))
    if when == "model after":
        model.to(dtype)
    elif when == "segmenter":
        segmenter.to(dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    probabilities = segmenter.probabilities(photo())
    assert probabilities.dtype == torch.float32
    assert 0 < (probabilities - expected).abs().max() < ERRORS[dtype]
    for name, weight in model.named_parameters():
        assert weight.dtype == dtype and torch.equal(weight, before[name])


@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_a_cast_to_float32_changes_nothing(package, expected):
    """The cast drops the imaginary part of Meta's rotary embedding, which is computed again."""
    model = package.model().to(torch.float32)
    probabilities = package.segmenter(CLASSES, model=model).probabilities(photo())
    assert torch.equal(probabilities, expected)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_a_calibrated_cast_model(package, dtype):
    """A token more or less among the outliers changes more than the rounding of the others does."""
    config = package.tiny.NONE
    frozen = package.segmenter(CLASSES, config).probabilities(photo())
    segmenter = package.segmenter(CLASSES, config)
    segmenter = segmenter.bfloat16() if dtype == torch.bfloat16 else segmenter.half()
    assert (segmenter.probabilities(photo()) - frozen).abs().max() < ERRORS[dtype]
    segmenter.config = package.tiny.ALL
    assert segmenter.probabilities(photo()).isfinite().all() and segmenter.outliers is not None


@pytest.mark.parametrize("calibrated", [False, True])
def test_autocast(package, calibrated):
    config = package.tiny.ALL if calibrated else None
    segmenter = package.segmenter(CLASSES, config)
    expected = segmenter.probabilities(photo())
    with torch.autocast("cpu", torch.bfloat16):
        probabilities = segmenter.probabilities(photo())
    assert probabilities.dtype == torch.float32
    assert 0 < (probabilities - expected).abs().max() < (0.1 if calibrated else 0.01)


def test_weights_come_back_after_an_error(monkeypatch):
    package = Package("meta")
    model = package.model().half()
    segmenter = package.segmenter(CLASSES, model=model)

    def broken(*_):
        raise RuntimeError("mine")

    monkeypatch.setattr(model, "forward_grounding", broken)
    with package.unpinned(), pytest.raises(RuntimeError, match="mine"):
        segmenter(photo())
    assert all(weight.dtype == torch.float16 for weight in model.parameters())


NAMES = {
    "none": ([], "classes must be names"),
    "one string": ("sky", "classes must be a list of names, got 'sky'"),
    "empty": (["sky", "tree,"], "classes must be names, none of them empty"),
    "case": (["Brick", "brick"], "classes must differ, and not by case alone, got Brick, brick"),
    "a shared synonym": (["person, man", "worker, man"], "got man more than once"),
    "a repeated synonym": (["sky, Sky"], "got Sky, sky more than once"),
    "background": (["tree", "background"], "classes must not name the background"),
    "2000": ([f"c{index}" for index in range(2000)], "classes must be at most 1203, got 2000"),
    "long": (["sky", " ".join("x" * 100)], "'x x .*' is too long a prompt: .* tokens"),
}


@pytest.mark.parametrize(("classes", "message"), NAMES.values(), ids=NAMES)
def test_names_that_are_refused(package, classes, message):
    with pytest.raises(ValueError, match=message):
        package.segmenter(classes)


def test_the_longest_names(package):
    """A name that fills the context is taken, and one more character is not."""
    length = 30 if package.name == "transformers" else 8  # transformers adds a start and an end
    package.segmenter(["x" * length if package.name == "meta" else " ".join("x" * length)])
    with pytest.raises(ValueError, match="too long a prompt"):
        more = length + 1
        package.segmenter(["x" * more if package.name == "meta" else " ".join("x" * more)])


SETTINGS = {
    "no heads": (dict(heads=()), ValueError, r"heads must be one or both of .*, got \(\)"),
    "heads": (dict(heads=("instance", "mask")), ValueError, "heads must be one or both of"),
    "a string": (dict(heads="instance"), ValueError, "got 'instance'"),
    "twice": (dict(heads=["semantic"] * 2), ValueError, "heads must be one or both of"),
    "a number of heads": (dict(heads=2), ValueError, "heads must be one or both of .* got 2"),
    "presence": (dict(presence=1), TypeError, "presence must be True or False, got 1"),
    "prob_thd": (dict(prob_thd=1.5), ValueError, r"prob_thd must be .* in \[0, 1\], got 1.5"),
    "margin": (dict(margin_thd=-1), ValueError, r"margin_thd must be .* in \[0, 1\], got -1"),
    "a word": (dict(margin_thd="x"), TypeError, "margin_thd must be a number, got str"),
    "no prompts": (dict(prompts_per_pass=0), ValueError, "prompts_per_pass must be at least 1"),
    "half a prompt": (dict(prompts_per_pass=0.5), TypeError, "prompts_per_pass must be an int"),
    "preview": (dict(preview=0.2), TypeError, "preview must be a Preview or None, got float"),
    "config": (dict(config={}), TypeError, "config must be a Sam3CalibrationConfig or None"),
}


@pytest.mark.parametrize(("settings", "kind", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_are_refused(settings, kind, message):
    with pytest.raises(kind, match=message):
        Package("transformers").segmenter(CLASSES, **settings)


def test_models_that_are_refused(package):
    model = package.model()
    with pytest.raises(TypeError, match=r"processor must be .*Sam3Processor.*, got Linear"):
        Sam3Segmenter(model, torch.nn.Linear(1, 1), CLASSES)
    with pytest.raises(ValueError, match="model must be a transformers Sam3Model or Meta's"):
        Sam3Segmenter(torch.nn.Linear(1, 1), package.processor(model), CLASSES)
    segmenter = package.segmenter(CLASSES, model=model)
    model.train()
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        segmenter(photo())


def test_hooks_of_accelerate_are_refused_with_a_calibration():
    package = Package("transformers")
    model = package.model()
    layer = model.vision_encoder.backbone.layers[-1]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    with pytest.raises(ValueError, match=r"Sam3ViTLayer has a forward that hides .* accelerate"):
        package.segmenter(CLASSES, package.tiny.ALL, model)
    package.segmenter(CLASSES, model=model)(photo())


def test_parts_that_a_model_of_meta_lacks():
    package = Package("meta")
    joint, headless, absent = (package.model() for _ in range(3))
    joint.supervise_joint_box_scores = True
    with pytest.raises(ValueError, match="supervise_joint_box_scores=True"):
        package.segmenter(CLASSES, model=joint)
    headless.segmentation_head = None
    with pytest.raises(ValueError, match="need a segmentation_head that has them, got None"):
        package.segmenter(CLASSES, model=headless)
    absent.transformer.decoder.presence_token = None
    with pytest.raises(ValueError, match="presence=True needs a decoder with a presence token"):
        package.segmenter(CLASSES, model=absent)
    with package.unpinned():
        segmenter = package.segmenter(CLASSES, model=absent, presence=False)
        assert segmenter.details(photo(), 0)[0].presence is None
        assert segmenter.probabilities(photo()).isfinite().all()
    with pytest.raises(ValueError, match="presence token"):
        package.segmenter(CLASSES, model=absent, presence=False, preview=Preview())


@pytest.mark.parametrize("head", ["presence", "masks", "semantic"])
def test_results_that_are_not_finite(head, monkeypatch):
    package = Package("transformers")
    model = package.model()
    weight = {
        "presence": model.detr_decoder.presence_head,
        "masks": model.mask_decoder.instance_projection,
        "semantic": model.mask_decoder.semantic_projection,
    }[head]
    next(weight.parameters())[...] = torch.nan
    with pytest.raises(NotFiniteError, match="logits and masks are not finite"):
        package.segmenter(CLASSES, model=model)(photo())
