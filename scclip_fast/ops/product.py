"""The matrix product in true float32, with the derivatives that torch's own has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import NAMESPACE
from ..precision import true_float32
from . import _check


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (B, N, K) @ b (B, K, M), of one dtype; float32 is multiplied as `true_float32`.

    A graph holds the product as one opaque op, which has reverse-mode derivatives of any order.
    Outside a graph, forward mode and torch.func work as well.
    """
    if not torch.compiler.is_compiling():
        return _Product.apply(a, b)
    _check.no_tangent("a product in a graph", a, b)
    return _product_op(a, b)


@true_float32
def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _save_operands(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_multiply)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _save_operands(ctx, inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return _Product.apply(grad, b.mT), _Product.apply(a.mT, grad)

    @staticmethod
    def jvp(ctx: Any, tangent_a: Tensor, tangent_b: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return _Product.apply(tangent_a, b) + _Product.apply(a, tangent_b)


_product_op = torch.library.custom_op(
    f"{NAMESPACE}::product", _multiply, mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor"
)


@_product_op.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return _product_op(grad, b.mT), _product_op(a.mT, grad)


_product_op.register_autograd(_backward, setup_context=_save_operands)
