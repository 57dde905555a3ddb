"""Makes float32 products on the CPU as coarse as the precision settings allow.

Few CPUs round the operands of float32 products, whatever torch allows. Within `coarse_products`,
aten's products on the CPU round them to TF32's 11 bits wherever a setting allows it, so that tests
on any machine detect a product that follows the settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MATMUL = [("cuda", "matmul"), ("mkldnn", "matmul")]
NEWER = hasattr(torch._C, "_get_fp32_precision_getter")  # the settings of torch 2.9


def settings() -> list[str]:
    """All settings of the precision of float32 products that torch can return."""
    try:
        values = [torch.get_float32_matmul_precision()]
    except RuntimeError:  # an older setting contradicts a newer one
        values = ["mixed"]
    if NEWER:
        places = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), *MATMUL, ("cuda", "conv")]
        values += [torch._C._get_fp32_precision_getter(*place) for place in places]
    return values


def reset() -> None:
    """Restores the settings of a fresh process."""
    torch.set_float32_matmul_precision("highest")
    if NEWER:
        for place in [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), *MATMUL]:
            torch._C._set_fp32_precision_setter(*place, "none")


def coarse() -> bool:
    """Whether the settings allow coarse products."""
    if NEWER:
        precisions = {torch._C._get_fp32_precision_getter(*place) for place in MATMUL}
        return bool(precisions & {"tf32", "bf16"})
    return torch.get_float32_matmul_precision() != "highest"


def rounded(x: Tensor) -> Tensor:
    """x as an array of float64; float32 is rounded to TF32 where the settings allow it."""
    if x.dtype == torch.float32 and coarse():
        x = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x.detach().double().numpy()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(rounded(a.contiguous()) @ rounded(b.contiguous())).to(a.dtype)


def attend(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    """The CPU's fused attention, with the arguments that the ops use."""
    scores = scale * multiply(q, k.mT)
    return multiply(scores.softmax(dim=-1), v), scores.logsumexp(dim=-1)


def sum_of(c, a, b, *, beta=1, alpha=1):
    return beta * c + alpha * multiply(a, b)


KERNELS = {
    "mm": multiply,
    "bmm": multiply,
    "addmm": sum_of,
    "baddbmm": sum_of,
    "mm.out": lambda a, b, *, out: out.copy_(multiply(a, b)),
    "bmm.out": lambda a, b, *, out: out.copy_(multiply(a, b)),
    "baddbmm.out": lambda *args, out, **kwargs: out.copy_(sum_of(*args, **kwargs)),
    "_scaled_dot_product_flash_attention_for_cpu": attend,
}


@contextmanager
def coarse_products() -> Iterator[None]:
    """Replaces aten's products on the CPU within the context."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, kernel in KERNELS.items():
            library.impl(name, kernel, "CPU")
        yield
    finally:
        library._destroy()
        reset()
