"""Markdown tables of result files: python bench/report.py bench/results/*.json

Results are those of `pytest --benchmark-json`, bench/by_hand.py, bench/targets.py,
bench/throughput.py, bench/vocabulary.py and bench/ablation.py. Other files have no table.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

OURS, FLOOR, FROZEN = "scclip_fast", "floor", "frozen"
BASELINES = ("scclip_fast triton", "scclip_fast torch", FROZEN)
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
FULL = "SC-CLIP"


def main(paths: list[str]) -> None:
    tables = [table(json.loads(Path(path).read_text())) for path in paths]
    print("\n\n".join(filter(None, tables)))


def table(results: dict) -> str:
    """Returns the table of a result file, or "" for a file of another script."""
    for key, write in WRITERS.items():
        if key in results:
            return write(results)
    return ""


def race_table(results: dict) -> str:
    """Returns the relative times and the memory that `harness.race` measured.

    Times are relative to scclip_fast's in the same run, or to the frozen SAM3's, because times of
    several runs do not compare. They are the shortest of the rounds: other work on the machine only
    ever adds to a time.
    """
    groups: dict[tuple, list[dict]] = {}
    for entry in results["benchmarks"]:
        info = entry["extra_info"] | {"seconds": entry["stats"]["min"]}
        groups.setdefault(_group(info), []).append(info)
    for info in results["skipped"]:
        groups.setdefault(_group(info), []).append(info)
    header = [
        "| op | shape | provider | relative time | peak extra memory |",
        "|---|---|---|--:|--:|",
    ]
    rows = [row for group, entries in groups.items() for row in _race_rows(group, entries)]
    return "\n".join([_race_machine(results), "", *header, *rows])


def _group(info: dict) -> tuple:
    return info["device"], info["op"], tuple(info["shape"]), info["dtype"]


def _race_machine(results: dict) -> str:
    machine = results["machine_info"]
    processor = f"{machine['cpu']['brand_raw']}, {_count(machine['torch_threads'], 'thread')}"
    devices = {entry["extra_info"]["device"] for entry in results["benchmarks"]}
    gpu = [machine["device_name"]] if "cuda" in devices else []
    names = ", ".join([*gpu, *([processor] if "cpu" in devices else [])])
    return _machine(names, results)


def _machine(names: str, results: dict) -> str:
    machine = results["machine_info"]
    packages = [f"{name} {machine[name]}" for name in ("torch", "triton") if machine[name]]
    return f"{names}; {', '.join(packages)}; {results['datetime'][:10]}; {revision(results)}"


def revision(results: dict) -> str:
    """Returns the commit of the results, and whether files differed from the commit."""
    if (commit := results.get("commit_info")) is None:
        return "no commit recorded"
    return f"commit {commit['id'][:7]}" + (" and changes beyond it" if commit["dirty"] else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _race_rows(group: tuple, entries: list[dict]) -> list[str]:
    """Returns the baseline, then the others, the fastest first, then those that did not fit."""
    _, op, shape, dtype = group
    timed = {entry["provider"]: entry["seconds"] for entry in entries if "seconds" in entry}
    baseline = next((name for name in BASELINES if name in timed), None)
    if baseline is None:
        return []

    def place(entry: dict) -> tuple:
        return entry["provider"] != baseline, timed.get(entry["provider"], math.inf)

    tokens = ", ".join(f"{n:,}" for n in shape) + ("" if dtype == "float32" else f" {dtype}")
    return [
        f"| {op} | {tokens} | {entry['provider']} | {_times(entry, timed[baseline])} "
        f"| {_bytes(entry.get('peak_bytes', entry.get('needs_bytes')))} |"
        for entry in sorted(entries, key=place)
    ]


def _times(entry: dict, baseline: float) -> str:
    if "seconds" not in entry:
        return "does not fit"
    ratio = entry["seconds"] / baseline
    return f"{ratio:.2f} ×" if ratio < 10 else f"{ratio:,.0f} ×"


def _bytes(size: int | None) -> str:
    if size is None:
        return "unknown"
    scale, unit = next((u for u in UNITS if size >= u[0]), UNITS[-1])
    return f"{size / scale:.3g} {unit}"


def target_table(results: dict) -> str:
    """Returns the times and the memory that bench/targets.py measured on a GPU."""
    groups = by_op_and_shape(results)
    lines = [_machine(results["machine_info"]["device_name"], results), ""]
    lines.append("| op | shape | scclip_fast | of its floor | extra memory | beside it |")
    lines.append("|---|---|--:|--:|--:|---|")
    lines += [_target_row(key, entries) for key, entries in groups.items() if OURS in entries]
    lines += ["", "| SAM3, bfloat16 | time | of the frozen model | extra memory |"]
    lines.append("|---|--:|--:|--:|")
    for (op, *_), entries in groups.items():
        if FROZEN in entries:
            lines += _stage_rows(op, entries)
    return "\n".join(lines)


def by_op_and_shape(results: dict) -> dict[tuple, dict[str, dict]]:
    """Returns the entries by (op, shape, dtype) and provider."""
    groups: dict[tuple, dict[str, dict]] = {}
    for entry in results["results"]:
        key = entry["op"], tuple(entry["shape"]), entry["dtype"]
        groups.setdefault(key, {})[entry["provider"]] = entry
    return groups


def _target_row(key: tuple, entries: dict[str, dict]) -> str:
    op, shape, dtype = key
    ours = entries[OURS]
    floor = entries.get(FLOOR)
    ratio = "" if floor is None else f"{ours['milliseconds'] / floor['milliseconds']:.2f} ×"
    others = ", ".join(
        _beside(name, entry, ours) for name, entry in entries.items() if name not in (OURS, FLOOR)
    )
    size = " × ".join(f"{n:,}" for n in shape)
    memory = f"{ours['peak_bytes'] / 1e6:,.0f} MB"
    time = f"{ours['milliseconds']:.3g} ms"
    return f"| `{op}` | {size} {dtype} | {time} | {ratio} | {memory} | {others} |"


def _stage_rows(op: str, entries: dict[str, dict]) -> list[str]:
    frozen = entries[FROZEN]["milliseconds"]
    return [
        f"| {op.replace('_', ' ')}: {name} | {entry['milliseconds']:.1f} ms | "
        f"{entry['milliseconds'] / frozen:.3f} × | {entry['peak_bytes'] / 1e6:,.0f} MB |"
        for name, entry in entries.items()
    ]


def _beside(name: str, entry: dict, ours: dict) -> str:
    """Returns the time of a peer relative to ours, and its share of right rows if not all are."""
    if "failed" in entry:
        return f"{name}: does not {'fit' if 'CUDA out of memory' in entry['failed'] else 'compile'}"
    exact = entry.get("exact_rows", 1)
    note = "" if exact == 1 else f" ({exact:.1%} of rows right)"
    return f"{name} {entry['milliseconds'] / ours['milliseconds']:.3g} ×{note}"


def ablation_table(results: dict) -> str:
    """Returns the mIoU of bench/ablation.py; the standard deviation is that of the seeds."""
    lines = [
        "| variant | mIoU | 95 % interval | sd | minus SC-CLIP | grounds | shapes | held out |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        low, high = row["ci95"]
        difference = "{:+.1f} to {:+.1f}".format(*row["minus_full_ci95"])
        lines.append(
            f"| {row['variant']} | {row['all']:.1f} | {low:.1f} to {high:.1f} "
            f"| {np.std(row['by_seed'], ddof=1):.1f} "
            f"| {'' if row['variant'] == FULL else difference} "
            f"| {row['grounds']:.1f} | {row['shapes']:.1f} | {row['held out']:.1f} |"
        )
    return "\n".join(lines)


def by_hand_table(results: dict) -> str:
    """Returns the ratios of bench/by_hand.py, a column for each number of threads."""
    threads = sorted({row["threads"] for row in results["by_hand"]})
    heads = " | ".join(_count(number, "thread") for number in threads)
    lines = [_machine(results["machine_info"]["device_name"], results), ""]
    lines += [f"| op | shape | {heads} |", "|---|---|" + "--:|" * len(threads)]
    ratios: dict[tuple, dict[int, float]] = {}
    for row in results["by_hand"]:
        ratios.setdefault((row["op"], tuple(row["shape"])), {})[row["threads"]] = row["ratio"]
    for (op, shape), by_threads in ratios.items():
        size = " × ".join(f"{n:,}" for n in shape)
        cells = " | ".join(f"{by_threads[number]:.2f}" for number in threads)
        lines.append(f"| {op} | {size} | {cells} |")
    return "\n".join(lines)


def vocabulary_table(results: dict) -> str:
    """Returns the CPU seconds a class and the memory of bench/vocabulary.py."""
    height, width = results["size"]
    lines = [_machine(results["machine_info"]["device_name"], results), ""]
    lines.append("| photo | classes | provider | CPU seconds a class | peak extra memory |")
    lines.append("|---|--:|---|--:|--:|")
    for row in sorted(results["vocabulary"], key=lambda row: row["classes"]):
        seconds = row["cpu_seconds"] / row["classes"]
        lines.append(
            f"| {height:,} × {width:,} | {row['classes']} | {row['provider']} | {seconds:.1f} "
            f"| {_bytes(row['peak_bytes'])} |"
        )
    return "\n".join(lines)


def throughput_table(results: dict) -> str:
    """Returns the images a second of bench/throughput.py, and their ratio to the first way's."""
    threads = _count(results["threads"], "thread")
    lines = [_machine(f"{results['machine_info']['device_name']}, {threads}", results), ""]
    lines += ["| command | way | images/s | ratio |", "|---|---|--:|--:|"]
    for command, rates in results["throughput"].items():
        first = next(iter(rates.values()))
        for way, rate in rates.items():
            lines.append(f"| {command} | {way} | {rate:.2f} | {rate / first:.2f} |")
    return "\n".join(lines)


# The key that only the results of one script have, and the table of these results.
WRITERS = {
    "benchmarks": race_table,
    "by_hand": by_hand_table,
    "results": target_table,
    "seeds": ablation_table,
    "throughput": throughput_table,
    "vocabulary": vocabulary_table,
}


if __name__ == "__main__":
    main(sys.argv[1:])
