"""The drawn scenes and the CLIP that was trained on them."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from tiny_clip import tiny_clip

from scclip_fast import scenes
from scclip_fast.clip import SCCLIP, SCCLIPConfig, create_model
from scclip_fast.scenes import train
from scclip_fast.scenes.draw import CLASSES, GROUNDS, HELD_OUT, SIZE, caption, scene
from scclip_fast.segment import Segmenter

FOLDER = Path(scenes.__file__).parent
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def benchmark_scenes():
    return [scene("benchmark", index) for index in range(24)]


@pytest.fixture(scope="module")
def pool():
    return train.Pool(24, json.loads(train.CONFIG.read_text()))


@pytest.mark.parametrize("split", ["train", "validation", "benchmark"])
def test_a_scene_is_the_same_at_every_call(split):
    first, again, other = scene(split, 3), scene(split, 3), scene(split, 4)
    assert (first.image == again.image).all() and (first.labels == again.labels).all()
    assert first.phrases == again.phrases
    assert (first.image != other.image).any()


def test_splits_differ():
    images = [scene(split, 0).image for split in ("train", "validation", "benchmark")]
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()


def test_labels_are_what_the_phrases_say(benchmark_scenes):
    for _, labels, phrases in benchmark_scenes:
        names = {" ".join(phrase.split()[-2:]) for phrase in phrases}
        assert {CLASSES[label] for label in np.unique(labels)} <= names
        shapes = {name for name in names if name not in GROUNDS}
        assert {CLASSES.index(name) for name in shapes} <= set(np.unique(labels))


def test_sizes_and_types():
    image, labels, _ = scene("train", 0, size=(96, 160))
    assert image.shape == (96, 160, 3) and image.dtype == np.uint8
    assert labels.shape == (96, 160) and labels.dtype == np.uint8
    assert scene("train", 0).labels.shape == SIZE


@pytest.mark.parametrize("split", ["train", "validation"])
def test_held_out_pairs_are_not_trained_on(split):
    phrases = [phrase for index in range(150) for phrase in scene(split, index).phrases]
    assert not any(phrase.endswith(tuple(HELD_OUT)) for phrase in phrases)


def test_held_out_pairs_are_in_the_benchmark():
    phrases = [phrase for index in range(60) for phrase in scene("benchmark", index).phrases]
    shapes = [phrase for phrase in phrases if phrase not in GROUNDS]
    held_out = [phrase for phrase in shapes if phrase.endswith(tuple(HELD_OUT))]
    assert 0.3 < len(held_out) / len(shapes) < 0.7
    # Their colours and shapes appear in other pairs, which are trained on.
    for phrase in HELD_OUT:
        color, shape = phrase.split()
        rest = set(CLASSES) - HELD_OUT
        assert any(name.startswith(color) for name in rest)
        assert any(name.endswith(shape) for name in rest)


def test_captions_name_nothing_that_is_not_there():
    rng = np.random.default_rng(0)
    phrases = ["red star", "striped blue ring", "grass", "sand"]
    captions = {caption(rng, phrases) for _ in range(200)}
    assert "red star and striped blue ring on grass and sand" in captions
    assert "grass" in captions and "red star" in captions  # parts of it
    for text in captions:
        assert set(text.replace(" and ", " on ").split(" on ")) <= set(phrases)


def test_a_window_is_captioned_by_what_it_shows(pool):
    assert pool.patch == 16
    for index in range(4):
        whole = pool._visible(index, slice(0, 224), slice(0, 224))
        assert set(whole) == set(pool.phrases[index].values())
        named = pool._visible(index, slice(0, 16), slice(0, 16))
        labels = np.unique(pool.labels[index][:16, :16])
        assert named and {train._class(phrase) for phrase in named} <= set(labels.tolist())


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["tok", "avg"])
def test_windows_keep_their_positions(pooling):
    model = tiny_clip(layers=2, pool_type=pooling)
    visual = model.visual
    pixels = torch.rand(3, 3, *visual.image_size)
    whole = train.encode_windows(model, pixels, torch.zeros(3, 2, dtype=torch.int64))
    torch.testing.assert_close(whole, model.encode_image(pixels, normalize=True))
    # The positional embedding of the rest of the image has no effect.
    patch, corner = visual.patch_size[0], torch.tensor([[1, 2]])
    crop = pixels[:1, :, patch : 3 * patch, 2 * patch : 4 * patch]
    features = train.encode_windows(model, crop, corner)
    table = visual.positional_embedding[1:].unflatten(0, visual.grid_size)
    inside = torch.zeros(visual.grid_size, dtype=torch.bool)
    inside[1:3, 2:4] = True
    table[~inside] += 1
    torch.testing.assert_close(train.encode_windows(model, crop, corner), features)
    table[inside] *= 2
    assert not torch.allclose(train.encode_windows(model, crop, corner), features, atol=1e-3)


def test_a_named_window_holds_the_shape(pool):
    kinds = set()
    for seed in range(30):
        batch = pool.named(np.random.default_rng(seed), 3, side=6)
        assert batch.pixels.shape[1:] == (3, 96, 96) and batch.corners.max() <= 14 - 6
        kinds.add(len({name for name in batch.captions if " " in name}) > 0)
        for thing in pool._fitting(None, 6):
            assert 48 <= thing.extent <= 96
    assert kinds == {True, False}  # with and without the colour


def test_equal_captions_are_one_text():
    """Both images of a caption are right for it, and one text stands for both captions."""
    model = tiny_clip(layers=2)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    pixels, corners = torch.rand(3, 3, *model.visual.image_size), torch.zeros(3, 2).long()
    batch = train.Batch(pixels, corners, ["star", "ring", "star"])
    loss = train.contrastive_loss(model, tokenizer, batch, torch.float32)
    image = train.encode_windows(model, pixels, corners)
    text = model.encode_text(tokenizer(["star", "ring"]), normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
    by_image, by_text = logits.log_softmax(dim=1), logits.log_softmax(dim=0)
    stars = (by_text[0, 0] + by_text[2, 0]) / 2
    expected = (by_image[0, 0] + by_image[1, 1] + by_image[2, 0]) / 3 + (stars + by_text[1, 1]) / 2
    torch.testing.assert_close(loss, -expected / 2)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Trains 21 steps into a folder, and returns the printed losses by step."""
    stages = (train.Stage(20, 8, (4,)), train.Stage(1, 4, (None,)))
    for name, value in dict(STAGES=stages, WARMUP=1, REPORT=1, POOL=100, CHECKPOINT=8).items():
        monkeypatch.setattr(train, name, value)

    def run(folder):
        monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path / folder)])
        train.main()
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {int(words[1]): float(words[3]) for words in lines if words[0] == "step"}

    return run


def test_training_lowers_the_loss_and_saves_a_model(run, tmp_path, monkeypatch):
    rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: rng(seed if seed[-1] > 19 else 0))
    losses = run("model")
    assert list(losses) == list(range(1, 22))
    assert losses[19] < losses[1] and losses[20] < losses[2]  # the same batches
    encoder, _ = create_model(f"local-dir:{tmp_path / 'model'}")
    assert encoder.patch_size == 16


def test_training_goes_on_after_an_interruption(run, tmp_path, monkeypatch, capsys):
    losses = run("whole")
    contrastive_loss, calls = train.contrastive_loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return contrastive_loss(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "contrastive_loss", interrupted)
        run("parts")
    capsys.readouterr()
    assert run("parts") == {step: losses[step] for step in range(9, 22)}
    whole, parts = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_shipped_model_is_small():
    assert (FOLDER / WEIGHTS).stat().st_size <= 16e6


@pytest.fixture(scope="module")
def shipped():
    return create_model("scenes")


@torch.inference_mode()
def test_the_shipped_model_matches_captions_to_scenes(shipped):
    """The model picks the right one of 24 captions far more often than by chance."""
    encoder, tokenizer = shipped
    scenes = [scene("validation", index) for index in range(24)]
    captions = [" and ".join(s.phrases[:-1]) + " on " + s.phrases[-1] for s in scenes]
    images = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in scenes]) / 255
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    image = encoder.model.encode_image((images - mean) / std, normalize=True)
    text = encoder.model.encode_text(tokenizer(captions), normalize=True)
    right = (image @ text.T).argmax(dim=1) == torch.arange(len(scenes))
    assert right.float().mean() > 0.4


def test_the_shipped_model_finds_the_grounds(shipped, benchmark_scenes):
    """Most pixels of a ground get its class, out of 42: chance is 1 in 42."""
    encoder, tokenizer = shipped
    best = SCCLIP(encoder.model, SCCLIPConfig(multi_level=False))  # see bench/ablation.py
    segmenter = Segmenter(best, tokenizer, CLASSES, short_side=None)
    right = total = 0
    for image, labels, _ in benchmark_scenes[:8]:
        ground = labels < len(GROUNDS)
        right += (segmenter(image).numpy() == labels)[ground].sum()
        total += ground.sum()
    assert right / total > 0.5
