"""Tests the kernel for Hugging Face's `kernels`: its ops give the bits of this package."""

import subprocess
import sys
from importlib import import_module
from inspect import getsource
from shutil import copytree, ignore_patterns
from types import ModuleType

import pytest
import torch
from cases import GPU, clusters
from kernels import get_local_kernel
from torch import Tensor

import scclip_fast as sf
from scclip_fast import hub

DEVICE = "cuda" if GPU else "cpu"
ROOT = hub.PACKAGE.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, "-m", "scclip_fast.hub", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def kernel(folder):
    return get_local_kernel(folder)


@pytest.fixture
def given():
    return [
        clusters(2, 12, 6).to(DEVICE),
        torch.randn(2, 3, 12, 8).to(DEVICE),
        (torch.rand(2, 12) < 0.3).to(DEVICE),
    ]


def every_op(ops: ModuleType, backend: str, x: Tensor, q: Tensor, mask: Tensor) -> dict:
    with ops.backend(backend):
        scores = ops.lof_scores(x, 5)
        return {
            "knn": ops.knn(x, 5),
            "lof_scores": [scores, ops.lof_scores(x, 5, variant="breunig")],
            "norm_scores": [ops.norm_scores(x)],
            "outlier_mask": [ops.outlier_mask(scores)],
            "lof": ops.lof(x, 5),
            "repair": [ops.repair(x, mask, (3, 4))],
            "similarity": [ops.similarity(x)],
            "aggregate": [ops.aggregate(x, x)],
            "adaptive_aggregate": [ops.adaptive_aggregate(x, ops.similarity(x))],
            "content_attention": [ops.content_attention(x, x)],
            "blended_attention": [ops.blended_attention(q, q, q, x)],
            "upsampled_labels": ops.upsampled_labels(q, (5, 7)),
        }


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() == set(sf.__all__) - {"backend"}
    for op, results in ours.items():
        assert all(torch.equal(*pair) for pair in zip(results, theirs[op], strict=True)), op


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_same_results_beside_the_package(kernel, given, backend):
    assert kernel.__all__ == sf.__all__
    assert_equal(every_op(sf, backend, *given), every_op(kernel, backend, *given))


def test_same_results_without_the_package(python, folder, given, tmp_path):
    torch.save(given, tmp_path / "given.pt")
    code = f"""
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
import torch
from kernels import get_local_kernel
from torch import Tensor
{getsource(every_op)}
kernel = get_local_kernel(Path({str(folder)!r}))
torch.save(every_op(kernel, "triton", *torch.load("given.pt")), "found.pt")
print(find_spec("scclip_fast"))
"""
    assert python(code, cwd=tmp_path, without=("scclip_fast",)) == ["None"]
    assert_equal(every_op(sf, "triton", *given), torch.load(tmp_path / "found.pt"))


def test_ops_of_its_own(kernel, given, monkeypatch):
    """The kernel and the package each run their own Triton kernels under their own op names."""
    x, *_ = given
    for silent, other in ((sf, kernel), (kernel, sf)):
        with monkeypatch.context() as patched:
            nearest = import_module(f"{silent.__name__}.kernels.knn")
            patched.delattr(nearest, "nearest_triton")
            other.knn(x, 3, backend="triton")
            with pytest.raises(ImportError, match="nearest_triton"):
                silent.knn(x, 3, backend="triton")
    assert hasattr(getattr(torch.ops, kernel.__name__), "nearest")


def test_compiles_and_differentiates(kernel, given):
    x, q, _ = given
    x.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        return kernel.blended_attention(q, q, q, kernel.aggregate(x, x)).sum()

    with kernel.backend("triton"):
        step(x).backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_a_checkout_without_links(tmp_path, monkeypatch):
    """`build` must not copy the text file that stands in place of the kernels without links."""
    source = tmp_path / "scclip_fast"
    ignored = ignore_patterns("__pycache__", "kernels", "scenes")
    copytree(hub.PACKAGE, source, ignore=ignored)
    (source / "kernels").write_text("../kernels")
    monkeypatch.setattr(hub, "PACKAGE", source)
    with pytest.raises(FileNotFoundError, match=r"kernels is no folder.*core\.symlinks true"):
        hub.build(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    copytree(ROOT / "kernels", tmp_path / "kernels")
    (source / "kernels").unlink()
    (source / "kernels").symlink_to("../kernels")
    (source / "precision.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"precision\.py is no file"):
        hub.build(tmp_path / "folder")


@pytest.mark.parametrize("words", [["--help"], [], ["--no-such", "x"], ["a", "b"]])
def test_what_is_no_folder_makes_none(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        hub.main(words)
    stderr = capsys.readouterr().err
    assert (exit.value.code, len(stderr.splitlines())) == ((0, 0) if "--help" in words else (2, 1))
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_is_there_is_kept(tmp_path, capsys):
    assert hub.main([str(tmp_path)]) == 0
    assert hub.main([str(tmp_path)]) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1 and "is there; choose another folder" in stderr


def test_builds_are_told_apart(folder, kernel, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError):
        hub.build(folder)

    source = tmp_path / "scclip_fast"
    copytree(hub.PACKAGE, source, ignore=ignore_patterns("__pycache__", "scenes"))
    monkeypatch.setattr(hub, "PACKAGE", source)
    hub.build(tmp_path / "copy")
    assert get_local_kernel(tmp_path / "copy").__name__ == kernel.__name__
    with open(source / "kernels" / "lof.py", "a") as file:
        file.write("# changed")
    hub.build(tmp_path / "changed")
    assert get_local_kernel(tmp_path / "changed").__name__ != kernel.__name__
