"""Files of the sub-commands: finding and reading images, naming and writing results."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .options import CommandError

if TYPE_CHECKING:  # of the extras
    from PIL import Image

_ENDINGS = {  # of the results, by kind
    "labels": "_labels.png",
    "overlay": "_overlay.png",
    "compare": "_compare.png",
    "json": ".json",
}
_PICTURES = tuple(ending for ending in _ENDINGS.values() if ending.startswith("_"))
_KEY = "scclip_fast"  # the name of the text in a PNG that holds the settings it was made with


class Job(NamedTuple):
    """An image and the results to make from it."""

    path: Path | None  # None for the example
    files: dict[str, Path]  # the results to write, by their kind in `_ENDINGS`
    settings: dict  # everything that the results depend on


def read_photo(path: Path, max_pixels: int | None = None) -> Image.Image:
    """Returns the image in a file by `segment.image.read`, or raises CommandError."""
    from ..segment import image

    try:
        return image.read(path, max_pixels)
    except image.ImageError as error:
        raise CommandError(f"cannot read the photo {error}") from None


def find_images(given: Iterable[str], recursive: bool, out: Path) -> list[Path]:
    """Returns the images of files, folders and globs, each once; folders and globs are sorted.

    Hidden files, files without an image's suffix, and results in `out` are left out of folders and
    globs.

    Raises:
        CommandError: one of `given` is not there, or holds no image.
    """
    images = {}
    for text in given:
        try:
            paths = _matches(text, recursive, out)
        except OSError as error:
            raise CommandError(f"cannot read {text}: {error.strerror or error}") from None
        for path in paths:
            images.setdefault(path.resolve(), path)
    return list(images.values())


def _matches(text: str, recursive: bool, out: Path) -> list[Path]:
    """Returns the images that one argument of the command names."""
    if not text:
        raise CommandError("an IMAGE has an empty name")
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        images = _images(path.rglob("*") if recursive else path.iterdir(), out)
    elif glob.has_magic(text):
        images = _images(map(Path, glob.glob(text, recursive=True)), out)
    else:
        raise CommandError(f"there is no file or folder {text}")
    if not images:
        hint = _hint(path, recursive) if path.is_dir() else ""
        raise CommandError(f"there is no image in {text}{hint}")
    return images


def _hint(folder: Path, recursive: bool) -> str:
    """Returns the end of an error: what a folder without images holds instead."""
    entries = list(folder.rglob("*") if recursive else folder.iterdir())
    endings = sorted({path.suffix.lower() for path in entries if path.is_file()} - {""})
    hint = ""
    if endings:
        from ..segment.image import suffixes

        read = ", ".join(sorted(suffixes()))
        hint = f"; its files end in {', '.join(endings[:5])}, images in {read}"
    if not recursive and any(path.is_dir() for path in entries):
        hint += "; --recursive looks into its folders"
    return hint


def _images(paths: Iterable[Path], out: Path) -> list[Path]:
    """Returns the images among paths, sorted, without the results in `out`."""
    from ..segment.image import suffixes

    out, taken = out.resolve(), suffixes()
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in taken
        and not path.name.startswith(".")
        and not (path.name.endswith(_PICTURES) and path.resolve().is_relative_to(out))
        and path.is_file()
    )


def names(images: list[Path]) -> list[str]:
    """Returns the names of the results of each image, without their endings.

    The name is the image's stem. Images that share a stem are named by their path from the folder
    that holds all of them, with their suffix: a/x.jpg and b/x.jpg give "a_x.jpg" and "b_x.jpg".

    Raises:
        CommandError: two images have the same name even so.
    """
    groups = {}
    for image in images:  # some file systems do not tell x and X apart
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
    images: list[Path | None],
    folder: Path,
    settings: dict,
    *,
    kinds: Sequence[str],
    force: bool,
    share: slice = slice(None),
) -> list[Job]:
    """Lists the missing results of each image, or all of them with `force`.

    Args:
        images: all images of a run; None for the example.
        folder: the folder of the results.
        settings: everything that results depend on, except the image.
        kinds: the results to make, keys of `_ENDINGS`.
        force: whether existing results are made again.
        share: the images to list; the others have their names alone.

    Raises:
        CommandError: a result is there that another image or other settings gave.
    """
    stems = ["example"] if images == [None] else names(images)
    jobs = []
    for image, stem in list(zip(images, stems, strict=True))[share]:
        image_settings = settings | {"image": image and _digest(image)}
        files = {kind: folder / f"{stem}{_ENDINGS[kind]}" for kind in kinds}
        if not force:
            for file in filter(os.path.exists, files.values()):
                _check_same(file, image_settings)
            files = {kind: file for kind, file in files.items() if not os.path.exists(file)}
        jobs.append(Job(image, files, image_settings))
    return jobs


def _digest(path: Path) -> str:
    """Returns the SHA-256 of a file, shortened; "" if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:  # `read_photo` reports the reason later
        return ""


def _check_same(path: Path, settings: dict) -> None:
    """Raises CommandError if a result was made with other settings or by another program."""
    stored = _stored_settings(path)
    if changed := [name for name in settings if stored.get(name) != settings[name]]:
        how = f"with another {', '.join(changed)}" if stored else "by something else"
        raise CommandError(
            f"{path} is there, made {how}; --force replaces it, another --out keeps both"
        )


def _stored_settings(path: Path) -> dict:
    """Returns the settings that a result was made with; empty for a file of another program."""
    from PIL import Image

    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
        with Image.open(path) as image:
            return dict(json.loads(image.info[_KEY]))
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def encode_png(image: Image.Image, settings: dict) -> bytes:
    """Returns a PNG file with the settings it was made with in its text."""
    from PIL.PngImagePlugin import PngInfo

    text, file = PngInfo(), io.BytesIO()
    text.add_text(_KEY, json.dumps(settings, allow_nan=False))
    image.save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def encode_json(report: dict) -> bytes:
    """Returns a JSON file, or raises ValueError for NaN and infinity."""
    return (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()


def make_folder(path: Path) -> None:
    """Makes a folder, or raises CommandError if files cannot be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write into {path}: {error.strerror or error}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise CommandError(f"cannot write into {path}: permission denied")


def check_output(option: str, path: Path, suffixes: Sequence[str], *, force: bool) -> None:
    """Checks that an output file can be written, and makes its folder, before the work starts.

    Args:
        option: the option that names the file, for errors.
        path: the file.
        suffixes: the endings allowed, one for each format; a path without an ending is allowed too.
        force: whether an existing file may be replaced.

    Raises:
        CommandError: the file cannot be written, is there already, or has another ending.
    """
    if path.suffix and path.suffix.lower() not in suffixes:
        allowed = ", ".join(suffixes)
        raise CommandError(f"{option} must end in {allowed}, got {path.name}")
    if os.path.isdir(path):
        raise CommandError(f"cannot write {path}: it is a directory")
    if os.path.exists(path) and not force:
        raise CommandError(f"{path} is there; --force replaces it, another {option} keeps both")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None
    if not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise CommandError(f"cannot write {path}: permission denied")


def write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; raises CommandError if that fails."""
    partial = path.with_name(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None
