"""The published benchmarks of training-free segmentation, without mmsegmentation.

`PROTOCOLS` are the settings, `PublishedSegmenter` segments as published, `run` is a resumable loop
over a data set on any number of processes, and `report` has its numbers.
`python -m scclip_fast.evaluate` is `scclip-fast eval`.

Needs the extra `eval`.
"""

from ..extras import needs

with needs("eval"):
    from . import settings
    from .datasets import DataError, DatasetNotFoundError
    from .loop import Ranks, process_group, run
    from .metric import confidence_interval, confusion_matrix, summary
    from .progress import Progress, SettingsChangedError
    from .protocols import PROTOCOLS, Protocol
    from .published import PublishedSegmenter, resize_uint8
    from .report import MissingResultsError, report, table

__all__ = [
    "PROTOCOLS",
    "DataError",
    "DatasetNotFoundError",
    "MissingResultsError",
    "Progress",
    "Protocol",
    "PublishedSegmenter",
    "Ranks",
    "SettingsChangedError",
    "confidence_interval",
    "confusion_matrix",
    "process_group",
    "report",
    "resize_uint8",
    "run",
    "settings",
    "summary",
    "table",
]
