"""Markdown tables of result files: python bench/report.py bench/results/*.json

Times are relative to scclip_fast's, or to the frozen SAM3's beside its stages, in the same run, as
times of several runs do not compare. They are the shortest of the rounds: what else a machine does
only ever adds to them.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

BASELINES = ("scclip_fast triton", "scclip_fast torch", "frozen")
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
HEADER = (
    "| op | shape | provider | relative time | peak extra memory |",
    "|---|---|---|--:|--:|",
)


def main(paths: list[str]) -> None:
    print("\n\n".join(table(json.loads(Path(path).read_text())) for path in paths))


def table(results: dict) -> str:
    groups: dict[tuple, list[dict]] = {}
    for entry in results["benchmarks"]:
        info = entry["extra_info"] | {"seconds": entry["stats"]["min"]}
        groups.setdefault(_group(info), []).append(info)
    for info in results["skipped"]:
        groups.setdefault(_group(info), []).append(info)
    rows = [row for group, entries in groups.items() for row in _rows(group, entries)]
    return "\n".join([_machine(results), "", *HEADER, *rows])


def _group(info: dict) -> tuple:
    return info["device"], info["op"], tuple(info["shape"]), info["dtype"]


def _machine(results: dict) -> str:
    machine = results["machine_info"]
    processor = f"{machine['cpu']['brand_raw']}, {_count(machine['torch_threads'], 'thread')}"
    devices = {entry["extra_info"]["device"] for entry in results["benchmarks"]}
    gpu = [machine["device_name"]] if "cuda" in devices else []
    names = ", ".join([*gpu, *([processor] if "cpu" in devices else [])])
    packages = [f"{name} {machine[name]}" for name in ("torch", "triton") if machine[name]]
    return f"{names}; {', '.join(packages)}; {results['datetime'][:10]}; {revision(results)}"


def revision(results: dict) -> str:
    if (commit := results.get("commit_info")) is None:
        return "no commit recorded"
    return f"commit {commit['id'][:7]}" + (" and changes beyond it" if commit["dirty"] else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _rows(group: tuple, entries: list[dict]) -> list[str]:
    """The baseline, then the others from the fastest to the slowest, then what did not fit."""
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


if __name__ == "__main__":
    main(sys.argv[1:])
