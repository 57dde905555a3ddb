"""Two segmenters with one protocol: an image and class names in, a mask out.

`Segmenter` runs a CLIP and `Sam3Segmenter` a SAM3; `ImageSegmenter` states what both offer. The
module `image` reads, resizes and cuts images, and `pamr` refines maps along their edges.
`choose_templates` finds the captions of each class for a `Segmenter`.
"""

from .base import ImageSegmenter
from .clip import Segmenter
from .sam3 import Sam3Segmenter
from .sam3_details import ClassDetails
from .sam3_heads import Preview
from .templates import choose_templates

__all__ = [
    "ClassDetails",
    "ImageSegmenter",
    "Preview",
    "Sam3Segmenter",
    "Segmenter",
    "choose_templates",
]
