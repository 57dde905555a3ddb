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
from scclip_fast.clip.config import STAGES
from scclip_fast.scenes import train
from scclip_fast.scenes.draw import CLASSES, GROUNDS, HELD_OUT, SIZE, caption, scene
from scclip_fast.scenes.pool import Pool
from scclip_fast.segment import Segmenter

FOLDER = Path(scenes.__file__).parent
WEIGHTS = "open_clip_model.safetensors"
LAYERS = dict(pre_adjust_idx=0, post_adjust_idx=0, multi_start_idx=0, multi_end_idx=1)


@pytest.fixture(scope="module")
def benchmark_scenes():
    return [scene("benchmark", index) for index in range(24)]


@pytest.fixture(scope="module")
def pool():
    return Pool(24, json.loads(train.CONFIG.read_text()))


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


@pytest.mark.parametrize("side", [5, 7, 14])
def test_windows_are_named_by_what_they_show(pool, side):
    """Each window's names are those of the labels in it, by one rule of naming a batch."""
    rules = set()
    for seed in range(24):
        batch = pool.windows(np.random.default_rng(seed), 4, side)
        size = (4, 3, side * pool.patch, side * pool.patch)
        assert batch.pixels.shape == size and batch.corners.max() <= 14 - side
        for pixels, (row, column), names in zip(
            batch.pixels, batch.corners, batch.names, strict=True
        ):
            rows, columns = (slice(16 * c, 16 * (c + side)) for c in (row, column))
            image = (pixels * pool.std + pool.mean).round().byte()
            (index,) = [
                i
                for i, each in enumerate(pool.images)
                if torch.equal(each[:, rows, columns], image)
            ]
            labels = pool.labels[index][rows, columns]
            shares = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
            shown = {CLASSES[c] for c in np.flatnonzero(shares > 0.01)}
            words = {name for name in names if name not in GROUNDS}
            assert {name for name in names if name in GROUNDS} == shown & set(GROUNDS)
            rules.update(_rule(word, shown - set(GROUNDS)) for word in words)
            assert len(words) <= len(shown - set(GROUNDS))
    assert rules == {"class", "shape", "color", "phrase"}


def _rule(word, shown):
    """Returns the rule by which a word names a class, which must be one of those shown."""
    parts = word.split()
    if parts[-1] == "shape":
        assert any(name.startswith(parts[0]) for name in shown)
        return "color"
    if len(parts) == 1:
        assert any(name.endswith(word) for name in shown)
        return "shape"
    assert " ".join(parts[-2:]) in shown
    return "phrase" if len(parts) == 3 else "class"


def test_most_windows_lie_around_shapes(pool):
    """Three quarters hold the middle of a shape that fits them, the others lie anywhere."""
    for shape in pool._fitting(5):
        assert 30 < shape.extent <= 86
    batch = pool.windows(np.random.default_rng(0), 4, 5)
    assert sum(any(name not in GROUNDS for name in names) for names in batch.names) >= 3


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["tok", "avg"])
def test_windows_keep_their_positions(pooling):
    model = tiny_clip(layers=2, pool_type=pooling)
    visual = model.visual
    pixels = torch.rand(3, 3, *visual.image_size)
    whole = train.encode_windows(model, pixels, torch.zeros(3, 2, dtype=torch.int64))
    if pooling == "tok":
        torch.testing.assert_close(whole.tokens[:, 0], model.encode_image(pixels, normalize=True))
    dense = SCCLIP(model, method="clip").encode_dense(pixels)
    torch.testing.assert_close(whole.tokens[:, 1:], dense.flatten(1, 2))
    without_stages = SCCLIPConfig(**LAYERS, **dict.fromkeys(STAGES, False))
    dense = SCCLIP(model, without_stages).encode_dense(pixels)
    torch.testing.assert_close(whole.attended, dense.flatten(1, 2))
    # The positional embedding of the rest of the image has no effect.
    patch, corner = visual.patch_size[0], torch.tensor([[1, 2]])
    crop = pixels[:1, :, patch : 3 * patch, 2 * patch : 4 * patch]
    features = train.encode_windows(model, crop, corner)
    table = visual.positional_embedding[1:].unflatten(0, visual.grid_size)
    inside = torch.zeros(visual.grid_size, dtype=torch.bool)
    inside[1:3, 2:4] = True
    table[~inside] += 1
    for found, expected in zip(train.encode_windows(model, crop, corner), features, strict=True):
        torch.testing.assert_close(found, expected)
    table[inside] *= 2
    for found, expected in zip(train.encode_windows(model, crop, corner), features, strict=True):
        assert not torch.allclose(found, expected, atol=1e-3)


def test_equal_captions_are_one_text():
    """Both images of a text are right for it, and one text stands for both captions."""
    logits = torch.randn(3, 2)
    by_image, by_text = logits.log_softmax(dim=1), logits.log_softmax(dim=0)
    first = (by_text[0, 0] + by_text[2, 0]) / 2
    expected = (by_image[0, 0] + by_image[1, 1] + by_image[2, 0]) / 3 + (first + by_text[1, 1]) / 2
    torch.testing.assert_close(train.contrastive(logits, [0, 1, 0]), -expected / 2)


def test_a_patch_is_guessed_to_be_one_of_its_windows_names():
    """The more probable name of the window, whatever other names are more probable still."""
    p = torch.tensor([[[0.5, 0.1, 0.4], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.8, 0.1, 0.1]]])
    named = torch.tensor([[False, True, True]])
    guess = train.guessed(p, named, least=0.0)
    assert (guess[..., 0] == 0).all()
    torch.testing.assert_close(
        guess[0, :, 1], torch.tensor([0.2, 0.875, 0.75, 0.5]), rtol=1e-4, atol=0
    )


def test_every_name_has_its_least_share_of_the_patches():
    """A ground that takes all patches leaves some to the shape: those where it is least sure."""
    p = torch.full((1, 10, 2), 0.999)
    p[0, :, 1] = torch.tensor([0.01] * 2 + [1e-4] * 8)
    p[0, :, 0] = 1 - p[0, :, 1]
    named = torch.ones(1, 2, dtype=torch.bool)
    assert train.guessed(p, named, least=0.0)[0, :, 1].mean() < 0.01
    guess = train.guessed(p, named, least=0.2)[0, :, 1]
    assert 0.15 < guess.mean() < 0.25
    assert (guess[:2] > 0.5).all() and (guess[2:] < 0.1).all()


def test_partial_labels_count_patches_and_names_alike():
    """The shape, one of four patches, has a quarter of one mean and half of the other."""
    log_p = torch.tensor([[[-0.1, -50.0, -50.0]] * 3 + [[-50.0, -2.0, -0.2]]])
    named = torch.tensor([[True, True, False]])
    loss = train.partial_labels(log_p, named, least=0.0)
    torch.testing.assert_close(
        loss, torch.tensor((3 * 0.1 + 2) / 8 + (0.1 + 2) / 4), rtol=2e-2, atol=0
    )


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Trains 21 steps into a folder, and returns the printed losses by step."""
    small, whole = train.Windows(8, 5), train.Windows(4, 14)
    stages = (train.Stage(20, (small,)), train.Stage(1, (whole,)))
    for name, value in dict(STAGES=stages, WARMUP=1, REPORT=1, POOL=100, CHECKPOINT=8).items():
        monkeypatch.setattr(train, name, value)

    monkeypatch.setattr(train, "fast_dtype", lambda: torch.float32)  # noise would change it

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
    assert losses[20] < losses[1]  # of the same batch
    encoder, _ = create_model(f"local-dir:{tmp_path / 'model'}")
    assert encoder.patch_size == 16


@pytest.mark.slow
def test_training_goes_on_after_an_interruption(run, tmp_path, monkeypatch, capsys):
    expected = run("whole")
    losses, calls = train.losses, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return losses(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "losses", interrupted)
        run("parts")
    capsys.readouterr()
    assert run("parts") == {step: expected[step] for step in range(9, 22)}
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


def test_the_shipped_model_finds_grounds_and_shapes(shipped, benchmark_scenes):
    """Most pixels get their class out of 42, and of the shapes, half of held-out pairs, a fifth."""
    encoder, tokenizer = shipped
    best = SCCLIP(encoder.model, SCCLIPConfig(multi_level=False))  # see bench/ablation.py
    segmenter = Segmenter(best, tokenizer, CLASSES, short_side=None)
    right, total = np.zeros(2), np.zeros(2)
    for image, labels, _ in benchmark_scenes[:8]:
        found = segmenter(image).numpy() == labels
        for kind, chosen in enumerate((labels < len(GROUNDS), labels >= len(GROUNDS))):
            right[kind] += found[chosen].sum()
            total[kind] += chosen.sum()
    grounds, shapes = right / total
    assert grounds > 0.6 and shapes > 0.2
