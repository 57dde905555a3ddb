"""The drawn scenes and the CLIP that was trained on them."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from tiny_clip import tiny_clip

from scclip_fast import scenes
from scclip_fast.clip import SCCLIP, SCCLIPConfig, create_model
from scclip_fast.scenes import train
from scclip_fast.scenes.draw import CLASSES, GROUNDS, HELD_OUT, SIZE, caption, scene
from scclip_fast.segment import Segmenter

FOLDER = Path(scenes.__file__).parent


@pytest.fixture(scope="module")
def benchmark_scenes():
    return [scene("benchmark", index) for index in range(24)]


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


def test_a_window_is_captioned_by_what_it_shows():
    config = json.loads(train.CONFIG.read_text())
    pool = train.Pool(4, config)
    assert pool.patch == 16
    for index in range(4):
        whole = pool._visible(index, slice(0, 224), slice(0, 224))
        assert set(whole) == set(pool.phrases[index].values())
        named = pool._visible(index, slice(0, 16), slice(0, 16))
        labels = np.unique(pool.labels[index][:16, :16])
        assert named and {train._class(phrase) for phrase in named} <= set(labels.tolist())


@torch.no_grad()
def test_windows_keep_their_positions():
    model = tiny_clip(layers=2)
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


def test_a_few_steps_of_training_lower_the_loss_and_are_saved(tmp_path, monkeypatch, capsys):
    stages = (train.Stage(6, 8, side=2), train.Stage(1, 4, side=None))
    small = dict(STAGES=stages, WARMUP=1, REPORT=1, POOL=8)
    for name, value in small.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path / "model")])
    train.main()
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(losses) == 7 and min(losses[3:6]) < losses[0]
    encoder, _ = create_model(f"local-dir:{tmp_path / 'model'}")
    assert encoder.patch_size == 16


def test_the_shipped_model_is_small():
    assert (FOLDER / "open_clip_model.safetensors").stat().st_size <= 16e6


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
