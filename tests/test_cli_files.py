"""Finding images, naming their results, and writing files whole."""

import os

import pytest
from cli_runs import written
from PIL import Image

from scclip_fast.cli import files
from scclip_fast.cli.options import CommandError


def test_a_file_is_written_whole_or_not(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")

    def killed(*args):
        assert len(written(tmp_path)) == 2
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        files.write(path, b"new")
    assert (path.read_bytes(), written(tmp_path)) == (b"old", ["x.png"])
    files.write(path, b"new")
    assert (path.read_bytes(), written(tmp_path)) == (b"new", ["x.png"])


def test_finding_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = ("b.JPG", "a.png", ".hidden.png", "notes.txt", "deep/c.webp")
    inside += tuple(f"out/a_{kind}.png" for kind in ("labels", "overlay", "compare"))
    for name in inside:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def find(*given, recursive=False):
        paths = files.find_images(given, recursive, tmp_path / "in" / "out")
        return [path.as_posix() for path in paths]

    assert find("in") == ["in/a.png", "in/b.JPG"]
    assert find("in", recursive=True) == ["in/a.png", "in/b.JPG", "in/deep/c.webp"]
    assert find("in/*") == ["in/a.png", "in/b.JPG"]
    assert find("in/**/*.webp") == ["in/deep/c.webp"]
    assert find("in/b.JPG", "in", "in/../in/a.png") == ["in/b.JPG", "in/a.png"]
    assert find("in/notes.txt", "in/out/a_labels.png") == ["in/notes.txt", "in/out/a_labels.png"]
    for given, message in (("in/*.gif", "no image in"), ("no", "no file or folder no")):
        with pytest.raises(CommandError, match=message):
            find(given)
    (tmp_path / "top" / "deep").mkdir(parents=True)
    with pytest.raises(CommandError, match=r"--recursive looks into its folders$"):
        find("top")


def test_a_folder_of_other_files(tmp_path):
    """The message names their format, with and without --recursive."""
    (tmp_path / "IMG_1.HEIC").touch()
    for recursive in (False, True):
        with pytest.raises(CommandError, match=r"files end in \.heic, images in \.avif, .*ebp$"):
            files.find_images([str(tmp_path)], recursive, tmp_path / "out")


def test_a_plug_in_brings_its_suffix(tmp_path, monkeypatch):
    (tmp_path / "IMG_1.HEIC").touch()
    monkeypatch.setitem(Image.registered_extensions(), ".heic", "HEIF")
    paths = files.find_images([str(tmp_path)], False, tmp_path / "out")
    assert paths == [tmp_path / "IMG_1.HEIC"]


def test_long_names_are_an_error(tmp_path):
    """The photo's name fits the file system, and the names of its results are too long."""
    photo = tmp_path / f"{250 * 'x'}.png"
    (job,) = files.jobs([photo], tmp_path, {}, kinds=["labels"], force=False)
    with pytest.raises(CommandError, match="File name too long"):
        files.write(job.files["labels"], b"")


def test_no_nan_is_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.encode_json({"share": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.encode_png(Image.new("L", (1, 1)), {"share": float("nan")})


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (("a/x.jpg", "a/y.jpg"), ["x", "y"]),
        (("a/x.jpg", "b/x.jpg", "b/y.jpg"), ["a_x.jpg", "b_x.jpg", "y"]),
        (("a/x.jpg", "a/x.png"), ["x.jpg", "x.png"]),
        (("a/x.jpg", "a/b/X.jpg"), ["x.jpg", "b_X.jpg"]),
    ],
)
def test_names_of_results(tmp_path, paths, expected):
    assert files.names([tmp_path / path for path in paths]) == expected


def test_names_that_cannot_differ(tmp_path):
    paths = [tmp_path / path for path in ("a/x.jpg", "b/x.jpg", "a_x.jpg.png")]
    with pytest.raises(CommandError, match=r"a_x.jpg.png would have one name"):
        files.names(paths)
