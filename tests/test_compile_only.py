"""Tests every kernel launch of the library, compiled ahead of time for GPUs that may be absent."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

AOT = Path(__file__).with_name("aot.py")
TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
if TRITON > (3, 4):  # Triton 3.4 links for AMD only where ROCm is installed
    TARGETS.append("gfx942")

pytestmark = pytest.mark.slow  # 35 s a target

good_code = pytest.mark.skipif(
    TRITON < (3, 8), reason="older compilers spill in some float32 kernels"
)

WITHOUT_PRODUCTS = ("round", "certify", "select", "search", "merge", "settle", "centre", "lof")
WITHOUT_PRODUCTS += ("repair", "upsample", "outliers", "norms", "largest", "split", "sums", "mean")


def has_products(row):
    return not row["launch"].startswith(WITHOUT_PRODUCTS)


@pytest.fixture(scope="module")
def targets(request):
    """The targets of the tests that this run has selected; sm_90 has tests of its own."""
    items = (item for item in request.session.items if item.path == request.path)
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return sorted({"sm_90"}.union(*({p["target"]} for p in params if "target" in p)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory, targets):
    out = tmp_path_factory.mktemp("aot") / "rows.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(AOT.parents[1])
    # With a cache of its own, a failure to compile cannot hide behind an earlier success.
    env["TRITON_CACHE_DIR"] = str(out.parent / "cache")
    done = subprocess.run(
        [sys.executable, str(AOT), str(out), *targets], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def test_report(rows, targets, record_property):
    """Records the table of resources, which `conftest.py` prints at the end of the run."""
    lines = [f"{'launch':<32} {'target':<7} registers shared spills"]
    for row in rows:
        name = f"{row['launch']:<32} {row['target']:<7}"
        lines.append(f"{name} {row['registers']:>9} {row['shared']:>6} {row['spills']:>6}")
    record_property("table", "\n".join(lines))
    assert {row["target"] for row in rows} == set(targets)


@good_code
@pytest.mark.parametrize("target", TARGETS)
def test_hardly_anything_spills(rows, target):
    """The tiles are those that an H200 ran fastest, some with a few registers on the stack."""
    most = 64 if target == "sm_90" else 256
    target_rows = [row for row in rows if row["target"] == target]
    assert len(target_rows) >= 20
    assert not [row for row in target_rows if row["spills"] > most or row["local"] > most]


@good_code
@pytest.mark.parametrize("target", TARGETS)
def test_products_run_on_matrix_cores(rows, target):
    target_rows = [row for row in rows if row["target"] == target]
    assert not [row for row in target_rows if has_products(row) and not row["matrix"]]


def test_hopper_uses_its_own_instruction(rows):
    """All products on Hopper are wgmma, as their tiles have 64 rows or more."""
    target_rows = [row for row in rows if row["target"] == "sm_90" and has_products(row)]
    assert not [row["launch"] for row in target_rows if "wgmma" not in row["matrix"]]


def test_shared_memory_fits(rows):
    """No launch takes more shared memory than its architecture has, by which its tile is chosen."""
    assert not [row for row in rows if row["shared"] > row["allowed"]]


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90"])
def test_float32_sums_leave_the_tensor_cores(rows, target):
    """No float32 sum stays in a tensor core's accumulator over all tokens, which would truncate it.

    Half precision, whose own rounding is coarser, is summed there.
    """
    carried = {row["launch"]: row["carried"] for row in rows if row["target"] == target}
    kernels = ("weights", "product", "stream", "attention")
    single = [name for name in carried if name.startswith(tuple(f"{k}-fp32" for k in kernels))]
    assert {name.split("-")[0] for name in single} == set(kernels)
    assert not [name for name in single if carried[name]]
    assert carried["product-fp16-v1024"] and carried["attention-fp16-d64"]
