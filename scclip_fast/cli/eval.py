"""`scclip-fast eval`: the published benchmarks, resumable, on one or several processes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from . import files, models, options
from .options import CommandError

if TYPE_CHECKING:  # these load open_clip and torchmetrics
    from ..clip import SCCLIP
    from ..evaluate import Protocol, PublishedSegmenter, Ranks
    from ..evaluate.datasets import Dataset

_DATASETS = (
    "voc20, voc21, context59, context60, coco-object, coco-stuff, cityscapes, ade20k, or all of "
    "these; scenes, the drawn ones that need no folder"
)


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the parser of `scclip-fast eval`."""
    parser = options.add_command(
        commands,
        "eval",
        "measure mIoU on the published benchmarks; an interrupted run goes on where it stopped",
        run,
        usage="%(prog)s DATASET [--root FOLDER] [options]",
        extra="eval",
        smaller="--precision fp16; finished images are kept",
    )
    parser.epilog = "On several GPUs: torchrun --nproc-per-node N -m scclip_fast.evaluate DATASET"
    add = parser.add_argument
    add("dataset", metavar="DATASET", help=_DATASETS)
    add("--root", metavar="FOLDER", type=Path, help="the data set's folder, or one above it")
    add(
        "--out",
        metavar="JSON",
        type=options.file_path,
        default=Path("eval.json"),
        help="the file of the results; finished images are recorded in files beside it, and all "
        "adds _DATASET to its name",
    )
    add(
        "--limit",
        metavar="N",
        type=options.positive,
        help="evaluate only the first N images; by default all of them, and 500 of scenes",
    )
    add("--force", action="store_true", help="replace existing results")
    add(
        "--pamr-steps",
        metavar="N",
        type=options.natural,
        default=0,
        help="number of refinement steps by PAMR, along the edges of the resized photo, as in the "
        "published code",
    )
    options.add_windows(parser)
    models.add_model(parser)
    models.add_method(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluates one data set or all of them."""
    from .. import evaluate

    names = [name for name in evaluate.PROTOCOLS if name != "scenes"]
    names = names if args.dataset == "all" else [args.dataset]
    _check(args, evaluate.PROTOCOLS)
    with evaluate.process_group(models.local_device(args)) as ranks:
        opened = {name: _open(args, name, ranks) for name in names}
        datasets = {name: dataset for name, dataset in opened.items() if dataset is not None}
        if not datasets:
            raise CommandError(f"no data set in {args.root} can be evaluated, see above")
        for name in datasets:
            _check_record(args, _out(args, name))
        encoder, tokenizer = models.load_encoder(args)
        digest, failures = evaluate.provenance.weights_digest(encoder), 0
        for name, dataset in datasets.items():
            settings = _settings(args, evaluate.PROTOCOLS[name], encoder, digest)
            segmenter = evaluate.PublishedSegmenter(
                encoder, tokenizer, settings["prompts"], shared_names=True, **settings["protocol"]
            )
            failures += _evaluate(args, segmenter, dataset, settings, ranks)
    problems = [f"{failures} image(s) could not be read, see above"] if failures else []
    if missing := [name for name in names if name not in datasets]:
        problems.append(f"left out: {', '.join(missing)}")
    if problems:
        raise CommandError("; ".join(problems))


def _check(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Checks the options before anything is loaded."""
    if args.dataset not in (*names, "all"):
        raise CommandError(f"there is no data set {args.dataset!r}; choose from {_DATASETS}")
    if args.root is None and args.dataset != "scenes":
        raise CommandError(f"{args.dataset} needs --root, the data set's folder or one above it")
    options.check_windows(args)
    files.check_output("--out", args.out, (".json",), force=True)


def _out(args: argparse.Namespace, name: str) -> Path:
    """Returns the file for the results of a data set."""
    if args.dataset != "all":
        return args.out
    return args.out.with_name(f"{args.out.stem}_{name}{args.out.suffix}")


def _check_record(args: argparse.Namespace, out: Path) -> None:
    """Raises CommandError if `out` exists without the record of the run that made it."""
    from ..evaluate import RunRecord

    if os.path.exists(out) and not args.force and not RunRecord.paths(out):
        raise CommandError(
            f"{out} is there, and no run that goes on here made it; --force replaces it, another "
            "--out keeps both"
        )


def _open(args: argparse.Namespace, name: str, ranks: Ranks) -> Dataset | None:
    """Opens a data set. For `all`, one that cannot be used gives None and a line on stderr."""
    from ..evaluate import PROTOCOLS, DataError, DatasetNotFoundError

    try:
        return PROTOCOLS[name].dataset(args.root, args.limit)
    except (DataError, DatasetNotFoundError) as error:
        if args.dataset != "all":
            raise CommandError(str(error)) from None
        if ranks.rank == 0:
            print(f"skipped {name}: {error}", file=sys.stderr)
        return None


def _settings(args: argparse.Namespace, protocol: Protocol, encoder: SCCLIP, digest: str) -> dict:
    """Returns all settings of an evaluation; "protocol" holds the arguments of the segmenter."""
    thresholds = asdict(protocol)
    for name in ("name", "dataset"):
        del thresholds[name]
    return {
        "dataset": protocol.name,
        "pixels": "resized in uint8 as by OpenCV, also as the picture that PAMR follows",
        "protocol": {
            **thresholds,
            "slide_crop": args.slide_crop or None,
            "slide_stride": args.slide_stride,
            "pamr_steps": args.pamr_steps,
        },
        "model": {
            "name": args.model,
            "pretrained": None if models.brings_weights(args.model) else args.pretrained,
            "method": args.method,
            "proxy": args.proxy,
            "precision": args.precision,
            "weights": digest,
        },
        "config": asdict(encoder.config) if args.method == "scclip" else {},
        "device": args.device.split(":")[0],
        "prompts": protocol.class_names(),
    }


def _evaluate(
    args: argparse.Namespace,
    segmenter: PublishedSegmenter,
    dataset: Dataset,
    settings: dict,
    ranks: Ranks,
) -> int:
    """Evaluates one data set to the end and returns the number of images that failed."""
    from .. import evaluate

    out = _out(args, settings["dataset"])
    source = {"version": __version__, "files": evaluate.provenance.dataset_files(dataset)}
    record = evaluate.RunRecord(out, settings | source)
    if ranks.rank == 0:
        print(_heading(settings, dataset), flush=True)
    try:
        if args.force and ranks.rank == 0:
            record.clear()
        ranks.wait()
        evaluate.run(segmenter, dataset, record, ranks)
        ranks.wait()
        if ranks.rank > 0:
            return 0
        report = evaluate.report(dataset, record, segmenter.classes)
        contents = settings | {"versions": evaluate.provenance.versions()} | report
        files.write(out, files.encode_json(contents))
    except evaluate.SettingsChangedError as error:
        hint = "--force discards them, another --out keeps both"
        raise CommandError(f"{error}; {hint}") from None
    except evaluate.MissingResultsError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        path = error.filename or out
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None
    print(f"{evaluate.table(report)}\nResults: {out}\n", flush=True)
    return len(report["failures"])


def _heading(settings: dict, dataset: Dataset) -> str:
    """Returns the lines about an evaluation that are printed before it starts."""
    folder = f" in {dataset.folder}" if dataset.folder else ""
    rows = {
        "data set": f"{settings['dataset']}, {len(dataset)} images{folder}",
        "protocol": _listed(settings["protocol"]),
        "model": _listed(settings["model"]),
        "config": _listed(settings["config"]) or "-",
        "device": settings["device"],
    }
    return "\n".join(f"{name:<10}{text}" for name, text in rows.items()) + "\n"


def _listed(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
