"""The files of `scclip-fast segment`: finding images, naming their results, writing them whole."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .common import CommandError

# Of what is taken from folders and globs.
_SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_PLUGINS = {".heic", ".heif"}  # where a plug-in of Pillow is registered for them
_ENDINGS = {
    "labels": "_labels.png",
    "overlay": "_overlay.png",
    "compare": "_compare.png",
    "json": ".json",
}
_OURS = tuple(ending for ending in _ENDINGS.values() if ending.startswith("_"))
_KEY = "scclip_fast"  # of the text in a PNG that holds the settings it was made with


class Job(NamedTuple):
    """An image and what is to be made of it."""

    path: Path | None  # None for the example
    files: dict[str, Path]  # results by kind, of `_ENDINGS`, that are not there yet
    settings: dict  # all that they depend on


def find_images(given: Iterable[str], recursive: bool, out: Path) -> list[Path]:
    """The images of files, folders and globs, each once; folders and globs are sorted.

    Folders and globs give no hidden files, no files without an image's suffix, and none of the
    results in `out`.

    Raises:
        CommandError: one of `given` is not there, or holds no image.
    """
    images = {}
    for text in given:
        try:
            found = _found(text, recursive, out)
        except OSError as error:
            raise CommandError(f"cannot read {text}: {error.strerror or error}") from None
        for image in found:
            images.setdefault(image.resolve(), image)
    return list(images.values())


def _found(text: str, recursive: bool, out: Path) -> list[Path]:
    if not text:
        raise CommandError("an IMAGE has an empty name")
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = _images(path.rglob("*") if recursive else path.iterdir(), out)
    elif glob.has_magic(text):
        found = _images(map(Path, glob.glob(text, recursive=True)), out)
    else:
        raise CommandError(f"there is no file or folder {text}")
    if not found:
        hint = _hint(path, recursive) if path.is_dir() else ""
        raise CommandError(f"there is no image in {text}{hint}")
    return found


def _hint(folder: Path, recursive: bool) -> str:
    """What is in a folder without images, as the end of an error."""
    entries = list(folder.rglob("*") if recursive else folder.iterdir())
    endings = sorted({path.suffix.lower() for path in entries if path.is_file()} - {""})
    hint = ""
    if endings:
        read = ", ".join(sorted(_suffixes()))
        hint = f"; its files end in {', '.join(endings[:5])}, images in {read}"
    if not recursive and any(path.is_dir() for path in entries):
        hint += "; --recursive looks into its folders"
    return hint


def _suffixes() -> set[str]:
    return _SUFFIXES | (_PLUGINS & Image.registered_extensions().keys())


def _images(paths: Iterable[Path], out: Path) -> list[Path]:
    out, suffixes = out.resolve(), _suffixes()
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in suffixes
        and not path.name.startswith(".")
        and not (path.name.endswith(_OURS) and path.resolve().is_relative_to(out))
        and path.is_file()
    )


def names(images: list[Path]) -> list[str]:
    """What the results of each image are called: its stem.

    Images that share a stem are called by their path, ending included, from the folder that holds
    all of them: a/x.jpg and b/x.jpg are "a_x.jpg" and "b_x.jpg".

    Raises:
        CommandError: two have one name even so.
    """
    groups = {}
    for image in images:  # file systems may not tell x and X apart
        groups.setdefault(image.stem.casefold(), []).append(image.resolve())
    roots = {stem: os.path.commonpath(path.parent for path in p) for stem, p in groups.items()}
    named = []
    for image in images:
        stem = image.stem.casefold()
        path = image.resolve().relative_to(roots[stem])
        named.append("_".join(path.parts) if len(groups[stem]) > 1 else image.stem)
    count = Counter(name.casefold() for name in named)
    if same := [i for i, name in zip(images, named, strict=True) if count[name.casefold()] > 1]:
        raise CommandError(f"the results of {same[0]} and {same[1]} would have one name")
    return named


def jobs(
    images: list[Path | None], folder: Path, settings: dict, *, kinds: Sequence[str], force: bool
) -> list[Job]:
    """What is to be made of each image; a result that is there is not, unless with force.

    Raises:
        CommandError: a result is there that another image or other settings gave.
    """
    stems = ["example"] if images == [None] else names(images)
    jobs = []
    for image, stem in zip(images, stems, strict=True):
        known = settings | {"image": image and _digest(image)}
        files = {kind: folder / f"{stem}{_ENDINGS[kind]}" for kind in kinds}
        if not force:
            for file in filter(os.path.exists, files.values()):
                _check_same(file, known)
            files = {kind: file for kind, file in files.items() if not os.path.exists(file)}
        jobs.append(Job(image, files, known))
    return jobs


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:  # reading the photo will say why
        return ""


def _check_same(path: Path, settings: dict) -> None:
    found = _stored_settings(path)
    if changed := [name for name in settings if found.get(name) != settings[name]]:
        how = f"with another {', '.join(changed)}" if found else "by something else"
        raise CommandError(
            f"{path} is there, made {how}; --force replaces it, another --out keeps both"
        )


def _stored_settings(path: Path) -> dict:
    """The settings that a result was made with; empty where it is none of ours."""
    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
        with Image.open(path) as image:
            return dict(json.loads(image.info[_KEY]))
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def encode_png(image: Image.Image, settings: dict) -> bytes:
    """A PNG file that holds its settings."""
    text, file = PngInfo(), io.BytesIO()
    text.add_text(_KEY, json.dumps(settings, allow_nan=False))
    image.save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def encode_json(report: dict) -> bytes:
    """A JSON file."""
    return (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()


def make_folder(path: Path) -> None:
    """CommandError unless the folder is there afterwards and files can be written in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write into {path}: {error.strerror or error}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise CommandError(f"cannot write into {path}: permission denied")


def write(path: Path, data: bytes) -> None:
    """Write all of a file or nothing, or CommandError."""
    partial = path.with_name(f".{os.getpid()}.part")
    try:
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None
