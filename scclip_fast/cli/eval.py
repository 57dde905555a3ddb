"""`scclip-fast eval`: the published benchmarks, resumable, on one or several processes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from . import classes as class_lists
from . import comparisons, eval_models, files, models, options, own_data, segment_sam3
from .models import CLIP
from .options import CommandError

if TYPE_CHECKING:  # these load open_clip and torchmetrics
    from ..evaluate import Protocol, Ranks
    from ..evaluate.datasets import Dataset

_DATASETS = (
    "voc20, voc21, context59, context60, coco-object, coco-stuff, cityscapes, ade20k, or all of "
    "these; scenes, the drawn ones that need no folder; folder, your own --images and --masks"
)


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the parser of `scclip-fast eval`."""
    parser = options.add_command(
        commands,
        "eval",
        "measure mIoU on benchmarks or your own images; an interrupted run goes on where it "
        "stopped",
        run,
        usage="%(prog)s DATASET [--root FOLDER] [options]",
        extra="eval",
        smaller="--precision fp16, --batch 1 or fewer --prompts-per-pass; finished images are kept",
    )
    parser.epilog = "On several GPUs: torchrun --nproc-per-node N -m scclip_fast.evaluate DATASET"
    add = parser.add_argument
    add("dataset", metavar="DATASET", help=_DATASETS)
    add("--root", metavar="FOLDER", type=Path, help="the data set's folder, or one above it")
    own_data.add(parser)
    add(
        "--allow-missing",
        action="store_true",
        help="leave out images without labels and labels without an image",
    )
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
        **CLIP,
    )
    options.add_windows(parser, **CLIP)
    models.add_batch(parser)
    comparisons.add(parser)
    segment_sam3.add_options(parser)
    models.add_model(parser)
    models.add_method(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluates one data set or all of them."""
    from .. import evaluate

    protocols = _protocols(args)
    options.check_windows(args)
    files.check_output("--out", args.out, (".json",), force=True)
    eval_models.check(args, list(protocols.values()))
    with evaluate.process_group(models.local_device(args)) as ranks:
        opened = {name: _open(args, protocol, ranks) for name, protocol in protocols.items()}
        datasets = {name: dataset for name, dataset in opened.items() if dataset is not None}
        if not datasets:
            raise CommandError(f"no data set in {args.root} can be evaluated, see above")
        for name in datasets:
            _check_record(args, _out(args, name))
        model, failures = eval_models.load(args), 0
        for name, dataset in datasets.items():
            failures += _evaluate(args, model, protocols[name], dataset, ranks)
    problems = [f"{failures} image(s) could not be read, see above"] if failures else []
    if missing := [name for name in protocols if name not in datasets]:
        problems.append(f"left out: {', '.join(missing)}")
    if problems:
        raise CommandError("; ".join(problems))


def _protocols(args: argparse.Namespace) -> dict[str, Protocol]:
    """Returns the protocol of each data set, or raises CommandError, before a model is loaded."""
    from ..evaluate import PROTOCOLS

    own_data.check(args)
    if args.dataset == own_data.NAME:
        return {own_data.NAME: own_data.protocol(args)}
    if args.dataset not in (*PROTOCOLS, "all"):
        raise CommandError(f"there is no data set {args.dataset!r}; choose from {_DATASETS}")
    if args.root is None and args.dataset != "scenes":
        raise CommandError(f"{args.dataset} needs --root, the data set's folder or one above it")
    chosen = [name for name in PROTOCOLS if name != "scenes"]
    return {n: PROTOCOLS[n] for n in (chosen if args.dataset == "all" else [args.dataset])}


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


def _open(args: argparse.Namespace, protocol: Protocol, ranks: Ranks) -> Dataset | None:
    """Opens a data set. For `all`, one that cannot be used gives None and a line on stderr."""
    from .. import evaluate
    from ..evaluate import DataError, DatasetNotFoundError, MissingFilesError

    try:
        dataset = protocol.dataset(args.root, args.limit, args.allow_missing)
    except (DataError, DatasetNotFoundError) as error:
        hint = "; --allow-missing goes on" if isinstance(error, MissingFilesError) else ""
        if args.dataset != "all":
            raise CommandError(f"{error}{hint}") from None
        if ranks.rank == 0:
            print(f"skipped {protocol.name}: {error}{hint}", file=sys.stderr)
        return None
    if dataset.left_out and ranks.rank == 0:
        count = f"{len(dataset.left_out)} of {len(dataset.left_out) + len(dataset.all_names)}"
        listed = evaluate.files.listed(dataset.left_out)
        print(f"{protocol.name}: {count} names are left out ({listed})", file=sys.stderr)
    return dataset


def _evaluate(
    args: argparse.Namespace,
    model: eval_models.ClipModel | eval_models.Sam3Model,
    protocol: Protocol,
    dataset: Dataset,
    ranks: Ranks,
) -> int:
    """Evaluates one data set to the end and returns the number of images that failed."""
    from .. import evaluate

    about = {"dataset": protocol.name} | model.settings(protocol)
    about |= {"device": args.device.split(":")[0], "prompts": protocol.class_names()}
    try:
        segmenter = model.segmenter(protocol, about)
    except ValueError as error:  # from the names of classes: one is too long, or two are the same
        raise CommandError(str(error)) from None
    out = _out(args, protocol.name)
    source = {"version": __version__, "files": evaluate.provenance.dataset_files(dataset)}
    record = evaluate.RunRecord(out, about | source)
    if ranks.rank == 0:
        print(_heading(about, dataset), flush=True)
    try:
        if args.force and ranks.rank == 0:
            record.clear()
        ranks.wait()
        evaluate.run(segmenter, dataset, record, ranks, models.batch(args))
        ranks.wait()
        if ranks.rank > 0:
            return 0
        names = list(map(class_lists.first_name, about["prompts"]))
        report = evaluate.report(dataset, record, names, list(model.compared))
        contents = about | {"versions": evaluate.provenance.versions()} | report
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
        "config": _listed(settings.get("config", {})) or ", ".join(settings.get("compare", "-")),
        "device": settings["device"],
    }
    return "\n".join(f"{name:<10}{text}" for name, text in rows.items()) + "\n"


def _listed(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
