"""Writes the ops as a kernel for Hugging Face's package `kernels`.

    python -m scclip_fast.hub FOLDER

    FOLDER/build/torch-universal/metadata.json
    FOLDER/build/torch-universal/scclip_fast/...       unchanged copies of the files of `CORE`

`kernels.get_local_kernel(FOLDER)` loads the kernel (older versions of `kernels` take a second
argument, "scclip_fast"), and `kernels.get_kernel` loads it from a repository that holds the same
files. The kernel has the ops of this package and needs torch and triton alone: its files import
each other relatively and register the ops under the name that they are loaded by.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

from .cli.options import Parser

PACKAGE = Path(__file__).parent
CORE = (
    "__init__.py",
    "backend.py",
    "dropin.py",
    "precision.py",
    "reference.py",
    "chunked",
    "ops",
    "kernels",
)
VERSION = 1  # of the kernel; callers pin it, and a change that breaks them raises it


def build(folder: Path) -> None:
    """Writes the kernel under `folder`.

    Its one variant, "torch-universal", fits every GPU and the CPU. The package is a folder inside
    the variant, because `kernels` 0.10 and older look for it nowhere else.

    Raises:
        FileExistsError: `folder` has a kernel already.
        FileNotFoundError: a file or folder of `CORE` is missing, as `kernels` is in a checkout
            without symbolic links. Nothing is written then.
    """
    for name in CORE:
        _check_source(PACKAGE / name)
    variant = folder / "build" / "torch-universal"
    package = variant / PACKAGE.name
    package.mkdir(parents=True)
    for name in CORE:
        if (PACKAGE / name).is_dir():
            copytree(PACKAGE / name, package / name, ignore=ignore_patterns("__pycache__"))
        else:
            copy(PACKAGE / name, package)
    metadata = {
        "id": f"_{PACKAGE.name}_{_digest(package)}",
        "name": PACKAGE.name.replace("_", "-"),
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},  # the field is required and has no value for all backends
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _check_source(path: Path) -> None:
    """Raises FileNotFoundError unless a module is a file, and a name without a suffix a folder."""
    if path.suffix and not path.is_file():
        raise FileNotFoundError(f"{path} is no file: the package is incomplete")
    if not path.suffix and not path.is_dir():
        raise FileNotFoundError(
            f"{path} is no folder: the checkout has no symbolic links, so build from an installed "
            'package (pip install .), or check out again with "git config core.symlinks true"'
        )


def _digest(package: Path) -> str:
    """Hash of all modules. With it in the id, one process can load several builds."""
    digest = sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m scclip_fast.hub`.

    Returns:
        The exit code: 0, or 2 after one line on stderr with the reason.
    """
    parser = Parser(
        prog="python -m scclip_fast.hub",
        description='Writes the ops as a kernel for Hugging Face\'s package "kernels".',
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="where the folder build is written"
    )
    folder = parser.parse_args(argv).folder
    try:
        build(folder)
    except FileExistsError as error:
        reason = f"{error.filename} is there; choose another folder, or delete it first"
    except (OSError, ValueError) as error:
        reason = f"cannot write {folder}: {getattr(error, 'strerror', None) or error}"
    else:
        return 0
    print(f"{parser.prog}: error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
