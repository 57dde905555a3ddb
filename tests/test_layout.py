"""The tree, the wheel, and the folder `kernels/` beside Hugging Face's package of that name."""

import os
import subprocess
import sys
import tarfile
import zipfile
from glob import glob
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"]
TOP_LEVEL = {".ci", ".gitignore", *FILES, "setup.py", "bench", "kernels", "scclip_fast", "tests"}


def hide(name: str, path: list[str], folder: Path) -> list[str]:
    """`path` with the site-packages that holds `name` replaced by links to all else in it."""
    try:
        hidden = distribution(name)
    except PackageNotFoundError:
        return path
    site = Path(hidden.locate_file("")).resolve()
    folder.mkdir()
    for entry in site.iterdir():
        if entry.name not in {file.parts[0] for file in hidden.files}:
            (folder / entry.name).symlink_to(entry)
    return [str(folder) if Path(p).resolve() == site else p for p in path]


@pytest.fixture
def python(tmp_path):
    """Run code in a fresh interpreter that has our dependencies, less one; returns its output."""

    def run(code: str, *, cwd: Path, path: tuple[Path, ...] = (), without: str | None = None):
        packages = [p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "tests")]
        if without:
            packages = hide(without, packages, tmp_path / "packages")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *packages])}
        env.pop("PYTHONSAFEPATH", None)
        # -S: the site module would put the full site-packages and an installed scclip_fast back.
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree with `dist/`: no old build/ can join in, and none is left behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        copy(ROOT / name, source)
    for name in ("kernels", "scclip_fast"):
        copytree(ROOT / name, source / name, symlinks=True, ignore=ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return source


@pytest.fixture(scope="module")
def wheel(source):
    (path,) = source.glob("dist/*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_no_file_makes_kernels_a_package():
    for path in ("kernels/__init__.py", "tests/__init__.py", "tests/kernels", "conftest.py"):
        assert not (ROOT / path).exists(), path
    assert os.readlink(ROOT / "scclip_fast" / "kernels") == os.path.join("..", "kernels")


def test_committed_tree():
    listing = ["git", "ls-files", "--stage", "-z"]
    staged = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True).stdout
    modes = {entry.split("\t")[1]: entry[:6] for entry in staged.split("\0") if entry}
    if not modes:
        pytest.skip("not a git checkout, or nothing is added to it yet")
    assert {path.split("/")[0] for path in modes} <= TOP_LEVEL
    assert modes["scclip_fast/kernels"] == "120000"
    assert modes[".ci/run"] == "100755"


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "absent"])
def test_transformers_beside_our_kernels(python, installed):
    code = """
from importlib.util import find_spec
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available())
print(find_spec("kernels").submodule_search_locations[0])
from transformers import CLIPModel, Sam3Model
"""
    available, found = python(code, cwd=ROOT, without=None if installed else "kernels")
    assert available == str(installed)
    assert (Path(found) != ROOT / "kernels") == installed


def test_archives_hold_the_package_as_files(source, wheel):
    tree = glob("scclip_fast/**/*", root_dir=source, recursive=True)
    files = {path for path in tree if (source / path).is_file()}
    assert any(path.startswith("scclip_fast/kernels/") for path in files)

    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files
    assert all(wheel.read(name) == (source / name).read_bytes() for name in names)

    (path,) = source.glob("dist/*.tar.gz")
    with tarfile.open(path) as sdist:
        regular = {member.name.split("/", 1)[1] for member in sdist if member.isfile()}
    assert files <= regular


def test_wheel_works_from_anywhere(python, wheel, tmp_path):
    code = """
from importlib.util import find_spec
import scclip_fast, scclip_fast.ops
print(scclip_fast.__file__)
print(*find_spec("scclip_fast.kernels").submodule_search_locations)
print(find_spec("kernels"))
"""
    site = tmp_path / "site"
    wheel.extractall(site)
    package = site / "scclip_fast"
    expected = [str(package / "__init__.py"), str(package / "kernels"), "None"]
    assert python(code, cwd=Path("/"), path=(site,), without="kernels") == expected


def test_import_is_light(python):
    loaded = python("import sys, scclip_fast; print(*sys.modules, sep='\\n')", cwd=ROOT)
    assert "torch" in loaded
    assert not {"triton", "open_clip", "transformers", "gradio"} & set(loaded)


def test_runs_without_triton(python):
    code = """
from importlib.util import find_spec
import torch, scclip_fast
print(find_spec("triton"))
print(scclip_fast.knn(torch.arange(4.0)[:, None], 1)[1].tolist())
"""
    expected = ["None", "[[1], [0], [1], [2]]"]
    assert python(code, cwd=ROOT, without="triton") == expected
