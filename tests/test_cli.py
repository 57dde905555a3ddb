"""`scclip-fast` as a whole: its parsers on any input, Ctrl+C, a closed pipe, lists of classes."""

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from shutil import copy

import pytest
from cli_runs import run, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from scclip_fast import __version__, cli
from scclip_fast.app import page as app_page
from scclip_fast.cli import classes, models
from scclip_fast.cli.common import CommandError

COMMAND = [sys.executable, "-c", "import sys; from scclip_fast.cli import main; sys.exit(main())"]


def options(command: str) -> list[str]:
    """All options of a sub-command."""
    (subparsers,) = (a for a in cli._parser()._actions if a.dest == "==SUPPRESS==" or a.choices)
    return [name for a in subparsers.choices[command]._actions for name in a.option_strings]


OPTIONS = {name: options(name) for name in ("segment", "eval", "lof", "app")}
# What a shell can pass: text, and bytes that are no UTF-8; no "/", so that all files stay here.
TEXT = st.one_of(st.text(max_size=8), st.binary(max_size=4).map(os.fsdecode)).filter(
    lambda text: not set(text) & set("\0/")
)
ODD = """. -1 0 1 nan 1e400 0.5 photo.png scenes cuda:99999 cpu:1 ViT-B/16 x/y hf-hub: local-dir:
new/x.json voc21 all random none ٣ --""".split()
VALUES = st.one_of(
    TEXT, st.sampled_from([*ODD, "", "a, b,", "x\ny", "\udcff", 30 * "9", 5000 * "9", 300 * "x"])
)


@st.composite
def arguments(draw) -> list[str]:
    command = draw(st.sampled_from(sorted(OPTIONS)))
    words = [command, *draw(st.lists(VALUES, max_size=2))]
    for option in draw(st.lists(st.sampled_from(OPTIONS[command]), max_size=3)):
        words += [option, *draw(st.lists(VALUES, max_size=1))]
    return words


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder with a photo, and models that are never there."""

    def no_model(*args, **options):
        raise CommandError("no model")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models, "_create", no_model)
    Image.effect_noise((60, 40), 50).save("photo.png")


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(arguments())
def test_any_input_ends_in_one_line(sandbox, words):
    code, _, stderr = run(*words)
    assert code in (0, 2)
    assert len(stderr.splitlines()) == (code == 2), stderr


def test_version():
    assert run("--version") == (0, f"scclip_fast {__version__}\n", "")


@pytest.mark.parametrize("text", ["a, b|c", "a, b|c,", ",a,, b|c , ", "a\nb|c\n"])
def test_lists_of_classes(text):
    """The command line takes what the page takes."""
    assert classes.checked(classes.split(text), "--classes") == ["a", "b, c"]
    assert app_page._classes(text) == ["a", "b, c"]


def test_files_of_classes(tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("a\n\nb, c,\n , \n")
    args = cli._parser().parse_args(
        ["segment", "x.png", "--model", "scenes", "--classes-file", str(tmp_path / "names.txt")]
    )
    assert classes.from_options(args) == ["a", "b, c"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        Image.effect_noise((60, 40), 50).save(folder / f"{index}.png")
    return folder


def test_one_class_gets_a_hint(photos, tmp_path):
    words = ("--model", "scenes", "--short-side", 32, "--device", "cpu", "--out", tmp_path / "out")
    code, _, stderr = run("segment", photos, "--classes", "sand", *words)
    assert code == 0 and stderr.startswith("hint: a single class gets every pixel")


def test_a_name_that_is_no_text(photos, monkeypatch):
    """stdout would refuse the byte that a file name may hold."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.chdir(photos)
    words = ["--model", "scenes", "--short-side", "32", "--device", "cpu", "--out", "\udcff"]
    assert cli.main(["segment", "0.png", *words]) == 0
    assert stdout.buffer.getvalue().endswith(b"Results: \\udcff\n")
    assert len(written(photos / "\udcff")) == 2


@pytest.mark.skipif(os.name == "nt", reason="needs the signals of POSIX")
def test_an_interrupt_leaves_whole_files(photos, tmp_path):
    for index in range(3, 40):
        copy(photos / "0.png", photos / f"{index}.png")
    words = [*COMMAND, "segment", photos, "--model", "scenes", "--device", "cpu"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    out = tmp_path / "segments"
    while process.poll() is None and not (out.is_dir() and written(out)):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == 130
    assert 0 < len(written(out)) < 80
    for name in written(out):
        Image.open(out / name).load()


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("words", [["lof", "--help"], ["lof", "0.png", "--size", "112"]])
def test_a_closed_pipe(photos, words):
    """As by `| head -1`: nobody reads what comes after the first bytes."""
    command = shlex.join([*COMMAND, *words, "--model", "scenes", "--device", "cpu"])
    shell = ["bash", "-c", f"{command} | head -c 1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, cwd=photos, capture_output=True, text=True)
    assert (done.stderr, len(done.stdout)) == ("", 1)
    assert done.returncode in (0, 1)
    assert set(written(photos)) <= {"0.png", "1.png", "2.png", "lof.png"}
