"""The command as a whole: any input, the models of all sub-commands, Ctrl+C, a closed pipe."""

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
from scclip_fast.cli.options import CommandError
from scclip_fast.clip.config import STAGES

COMMAND = [sys.executable, "-c", "import sys; from scclip_fast.cli import main; sys.exit(main())"]


def options(command: str) -> list[str]:
    """Returns all options of a sub-command."""
    (subparsers,) = (a for a in cli._parser()._actions if a.dest == "==SUPPRESS==" or a.choices)
    return [name for a in subparsers.choices[command]._actions for name in a.option_strings]


OPTIONS = {name: options(name) for name in ("segment", "eval", "lof", "app")}
# A shell can pass text and bytes that are no UTF-8. Without "/" all files stay in the sandbox.
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
    """A folder with a photo, where no model can be loaded."""

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


SHARED = ("--model", "--pretrained", "--precision", "--device")


def test_the_commands_share_the_options_of_a_model():
    (subparsers,) = (a for a in cli._parser()._actions if a.dest == "==SUPPRESS==" or a.choices)
    for option in SHARED:
        variants = {
            (str(action.choices), action.metavar, action.help)
            for command in OPTIONS
            for action in subparsers.choices[command]._actions
            if option in action.option_strings
        }
        assert len(variants) == 1, option
    for command, names in OPTIONS.items():
        assert set(SHARED) <= set(names), command
    assert models.SWITCHES.keys() == set(STAGES)


WORDS = {  # the least that each command needs
    "segment": ["photo.png", "--classes", "sky"],
    "eval": ["scenes", "--limit", "1"],
    "lof": ["photo.png"],
    "app": [],
}
WRONG_MODELS = {
    "device": (["--device", "tpu"], "--device must be cpu, cuda or cuda:INDEX, got 'tpu'"),
    "no device": (["--device", "cuda:99"], "--device cuda:99 is not there"),
    "precision": (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
    "no folder": (["--model", "./no"], "--model: there is no folder ./no"),
    "no model": (["--model", "."], "the folder . holds no model"),
    "name": (["--model", "ViT-X"], "unknown model 'ViT-X'"),
    "repository": (["--model", "openai/clip"], "--model also takes the folder of a download"),
    "no weights": (["--model", "ViT-B-32", "--pretrained", ""], "--pretrained must name weights"),
    "other weights": (["--model", "ViT-B-32", "--pretrained", "x"], "ViT-B-32 has no weights 'x'"),
}


@pytest.mark.parametrize(("words", "message"), WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_the_commands_fail_in_the_same_words(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Image.effect_noise((60, 40), 50).save("photo.png")
    errors = {}
    for command, needed in WORDS.items():
        code, _, stderr = run(command, *needed, *words)
        prefix = f"scclip-fast {command}: error: "
        assert (code, stderr.count("\n")) == (2, 1) and stderr.startswith(prefix)
        errors[command] = stderr.removeprefix(prefix)
    assert message in errors["segment"] and len(set(errors.values())) == 1, errors


def test_version():
    assert run("--version") == (0, f"scclip_fast {__version__}\n", "")


@pytest.mark.parametrize("text", ["a, b|c", "a, b|c,", ",a,, b|c , ", "a\nb|c\n"])
def test_lists_of_classes(text):
    """The command line and the page take the same lists."""
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
    """A file name may hold a byte that stdout would refuse to encode."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.chdir(photos)
    words = ["--model", "scenes", "--short-side", "32", "--device", "cpu", "--out", "\udcff"]
    assert cli.main(["segment", "0.png", *words]) == 0
    assert stdout.buffer.getvalue().endswith(b"Results: \\udcff\n")
    assert len(written(photos / "\udcff")) == 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs the signals of POSIX")
def test_an_interrupt_leaves_whole_files(photos, tmp_path):
    for index in range(3, 200):
        copy(photos / "0.png", photos / f"{index}.png")
    words = [*COMMAND, "segment", photos, "--model", "scenes", "--device", "cpu"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    out = tmp_path / "segments"
    while process.poll() is None and not (out.is_dir() and written(out)):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == 130
    assert 0 < len(written(out)) < 400
    for name in written(out):
        Image.open(out / name).load()


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    "words",
    [["lof", "--help"], pytest.param(["lof", "0.png", "--size", "112"], marks=pytest.mark.slow)],
)
def test_a_closed_pipe(photos, words):
    """The reader stops after the first bytes, as with `| head -1`."""
    command = shlex.join([*COMMAND, *words, "--model", "scenes", "--device", "cpu"])
    shell = ["bash", "-c", f"{command} | head -c 1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, cwd=photos, capture_output=True, text=True)
    assert (done.stderr, len(done.stdout)) == ("", 1)
    assert done.returncode in (0, 1)
    assert set(written(photos)) <= {"0.png", "1.png", "2.png", "lof.png"}
