"""The torch path: the reference's equations tile by tile, never an N x N tensor.

It runs on the CPU, and on a GPU where the kernels do not. Beyond the tensors that it returns, a
call holds at most about `tiles.WORKSPACE_BYTES`, whatever N, D and the batch are, plus O(B N)
floats (norms, sums). Two ops hold more: the neighbours by cosine the unit vectors of one image in
float64, and `repair`, which has no tiles, a few times the memory of its tokens.
"""

from .aggregate import aggregate, aggregate_backward, inverse_norms
from .attention import attention, attention_backward, blended_attention, can_blend_weights
from .metrics import nearest, settle_by_cosine, unit_tokens
from .repair import repair, repair_backward
from .tiles import compute_dtype
from .upsample import label_dtype, upsampled_labels

__all__ = [
    "aggregate",
    "aggregate_backward",
    "attention",
    "attention_backward",
    "blended_attention",
    "can_blend_weights",
    "compute_dtype",
    "inverse_norms",
    "label_dtype",
    "nearest",
    "repair",
    "repair_backward",
    "settle_by_cosine",
    "unit_tokens",
    "upsampled_labels",
]
