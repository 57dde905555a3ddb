"""Tests the tree, the archives, and `kernels/` beside Hugging Face's package of that name."""

import os
import subprocess
import sys
import tarfile
import zipfile
from glob import glob
from importlib import import_module
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

import scclip_fast as sf
from scclip_fast.extras import needs

ROOT = Path(__file__).resolve().parents[1]
FILES = ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"]
TOP_LEVEL = {".ci", ".gitignore", *FILES, "setup.py", "bench", "kernels", "scclip_fast", "tests"}


def run(*arguments, cwd):
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["links", "no links"])
def source(request, tmp_path_factory):
    """A copy of the tree with `dist/`, so that no old build/ is used and none is left behind.

    Without symbolic links, git writes the target of a link into a text file.
    """
    source = tmp_path_factory.mktemp("source")
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        copy(ROOT / name, source)
    for name in ("kernels", "scclip_fast"):
        copytree(ROOT / name, source / name, symlinks=True, ignore=ignore_patterns("__pycache__"))
    if request.param == "no links":
        (source / "scclip_fast" / "kernels").unlink()
        (source / "scclip_fast" / "kernels").write_text("../kernels")
    code = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    run("-c", code, cwd=source)
    return source


@pytest.fixture(scope="module")
def wheel(source):
    (path,) = source.glob("dist/*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_no_file_makes_kernels_a_package():
    for path in ("tests/__init__.py", "tests/kernels", "conftest.py"):
        assert not (ROOT / path).exists(), path
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    assert os.readlink(ROOT / "scclip_fast" / "kernels") == os.path.join("..", "kernels")


def test_committed_tree():
    listing = ["git", "ls-files", "--stage", "-z"]
    staged = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True).stdout
    modes = {entry.split("\t")[1]: entry[:6] for entry in staged.split("\0") if entry}
    if not modes:
        pytest.skip("not a git checkout, or nothing is added to it yet")
    assert {path.split("/")[0] for path in modes} <= TOP_LEVEL
    assert modes["scclip_fast/kernels"] == "120000"
    assert modes[".ci/run"] == modes[".ci/matrix"] == "100755"


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "absent"])
def test_transformers_beside_our_kernels(python, installed):
    code = """
from importlib.util import find_spec
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available())
print(find_spec("kernels").submodule_search_locations[0])
from transformers import CLIPModel, Sam3Model
"""
    available, found = python(code, cwd=ROOT, without=() if installed else ("kernels",))
    assert available == str(installed)
    assert (Path(found) != ROOT / "kernels") == installed


def test_archives_hold_the_package_as_files(source, wheel, tmp_path):
    tree = glob("scclip_fast/**/*", root_dir=source, recursive=True)
    paths = [source / path for path in tree if not path.startswith("scclip_fast/kernels")]
    files = {path.relative_to(source).as_posix(): path for path in paths if path.is_file()}
    kernels = (path for path in source.glob("kernels/**/*") if path.is_file())
    files |= {f"scclip_fast/{path.relative_to(source).as_posix()}": path for path in kernels}
    assert {"scclip_fast/py.typed", "scclip_fast/kernels/knn_details/table.py"} <= files.keys()

    assert_holds(wheel, files)
    (path,) = source.glob("dist/*.tar.gz")
    with tarfile.open(path) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    run("-c", "from setuptools import build_meta as b; b.build_wheel('dist')", cwd=unpacked)
    (path,) = unpacked.glob("dist/*.whl")
    with zipfile.ZipFile(path) as archive:
        assert_holds(archive, files)


def assert_holds(wheel, files):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files.keys()
    assert all(wheel.read(name) == path.read_bytes() for name, path in files.items())


def test_editable_install(python, source, tmp_path):
    """An editable install uses the kernels of the checkout, so that edits need no new install."""
    run("-c", "from setuptools import build_meta as b; b.build_editable('editable')", cwd=source)
    (path,) = source.glob("editable/*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site := tmp_path / "site")
    code = f"""
from site import addsitedir
addsitedir({str(site)!r})
from scclip_fast.kernels import _launch
from scclip_fast.kernels.knn_details import table
print(_launch.__file__, table.__file__, sep="\\n")
"""
    launch, table = python(code, cwd=tmp_path, path=(site,))
    assert os.path.samefile(launch, source / "kernels" / "_launch.py")
    assert os.path.samefile(table, source / "kernels" / "knn_details" / "table.py")


@pytest.mark.parametrize("source", ["links"], indirect=True)  # both wheels are the same
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
    assert python(code, cwd=Path("/"), path=(site,), without=("kernels",)) == expected


OPTIONAL = (
    *("gradio", "matplotlib", "numpy", "open_clip_torch", "pillow", "scikit-learn", "torchmetrics"),
    *("torchvision", "tqdm", "transformers", "triton"),
)


def test_every_op_is_type_checked():
    text = (ROOT / "tests" / "public_types.py").read_text()
    assert not [name for name in sf.__all__ if f"sf.{name}(" not in text]


def test_core_needs_torch_alone(python):
    """`import scclip_fast` loads nothing but torch, and the ops run without other packages."""
    code = """
import sys, torch
before = set(sys.modules)
import scclip_fast as sf
print({name.split(".")[0] for name in set(sys.modules) - before})
x = torch.arange(8.0).view(4, 2)
print(sf.knn(x, 1)[1].tolist())
q, mask = x.view(1, 4, 2), sf.outlier_mask(sf.lof_scores(x, 2))
sf.blended_attention(q, q, q, sf.aggregate(sf.repair(x, mask, (2, 2)), x))
print({"numpy", "triton"} & set(sys.modules))
"""
    expected = ["{'scclip_fast'}", "[[1], [0], [1], [2]]", "set()"]
    assert python(code, cwd=ROOT, without=OPTIONAL) == expected


def test_missing_packages_name_their_extra(python):
    extras = {
        "clip.loading": "open_clip clip",
        "segment": "numpy clip",
        "segment.image": "numpy clip",
        "scenes.draw": "numpy clip",
        "evaluate": "numpy eval",
        "sklearn": "numpy sklearn",
    }
    code = f"""
from importlib import import_module
for name in {list(extras)}:
    try:
        import_module("scclip_fast." + name)
    except ModuleNotFoundError as error:
        print(error)
"""
    messages = (message.split() for message in extras.values())
    assert python(code, cwd=ROOT, without=OPTIONAL) == [
        f'needs the package {package}: pip install "scclip_fast[{extra}]"'
        for package, extra in messages
    ]


def test_a_missing_module_of_ours_is_no_missing_package():
    with pytest.raises(ModuleNotFoundError) as raised, needs("clip"):
        import_module("scclip_fast.nothing")
    assert type(raised.value) is ModuleNotFoundError
