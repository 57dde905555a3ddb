"""The published benchmarks of training-free segmentation, without mmsegmentation.

`PROTOCOLS` holds the settings of each benchmark, `PublishedSegmenter` segments as published, `run`
is a resumable loop over a data set on any number of processes, and `report` computes the numbers.
`compare_clip` and `compare_sam3` make a `Comparison` of several settings, which `run` takes too.
`scclip-fast eval` puts them together. This package needs the extra `eval`.
"""

from ..extras import needs

with needs("eval"):
    from ..ranks import Ranks, process_group
    from . import provenance
    from .comparison import Comparison, Sam3Labels, SharedTrunk, compare_clip, compare_sam3
    from .files import DataError, DatasetNotFoundError, MissingFilesError, read_colors, read_list
    from .loop import run
    from .metric import confidence_interval, confusion_matrix, summary
    from .own_dataset import OwnDataset
    from .protocols import PROTOCOLS, OwnProtocol, Protocol
    from .published import PublishedSegmenter, resize_uint8
    from .record import RunRecord, SettingsChangedError
    from .report import MissingResultsError, report, table

__all__ = [
    "PROTOCOLS",
    "Comparison",
    "DataError",
    "DatasetNotFoundError",
    "MissingFilesError",
    "MissingResultsError",
    "OwnDataset",
    "OwnProtocol",
    "Protocol",
    "PublishedSegmenter",
    "Ranks",
    "RunRecord",
    "Sam3Labels",
    "SettingsChangedError",
    "SharedTrunk",
    "compare_clip",
    "compare_sam3",
    "confidence_interval",
    "confusion_matrix",
    "process_group",
    "provenance",
    "read_colors",
    "read_list",
    "report",
    "resize_uint8",
    "run",
    "summary",
    "table",
]
