"""FLOP formulas that `torch.utils.flop_counter` lacks, and a counter that has them.

    >>> with flop_counter() as counter:
    ...     model(**batch).loss.backward()
    >>> counter.get_total_flops()        # 2 FLOPs per multiply-add

Without them, attention on the CPU, fused experts and in-place matrix products count as free: 5 to 75 % of a model.
Formulas take shapes, as those of `torch.utils.flop_counter.flop_registry` do.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils.flop_counter import (
    FlopCounterMode,
    bmm_flop,
    flop_registry,
    mm_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)


Shape = torch.Size


def _attention(q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    flops: int = sdpa_flop_count(q, k, v)
    return flops


def _attention_backward(grad_out: Shape, q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    flops: int = sdpa_backward_flop_count(grad_out, q, k, v)
    return flops


def _grouped_mm(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    # Each of the M rows of a 2-D `a` (M, K) meets one group of `b` (G, K, N); with both 2-D the groups split K.
    groups = a[0] if len(a) == 3 and len(b) == 3 else 1
    return 2 * groups * prod(a[-2:]) * b[-1]


def _grouped_mm_backward(a: Shape, b: Shape, offs: Shape, grad_out: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _grouped_mm(a, b)


def _addmm(self: Shape, a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return mm_flop(a, b)


def _addbmm(self: Shape, a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return bmm_flop(a, b)


def _mm(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return mm_flop(a, b)


def _mv(a: Shape, x: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a)


def _addmv(self: Shape, a: Shape, x: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a)


def _int8_scaled_mm(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a) * b[0]  # b: (N, K)


def _int8_mixed_scaled_mm(a: Shape, quantized_a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a) * b[0]


def _gemm_4bit(a: Shape, packed: Shape, shape: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a[:-1]) * prod(shape)


_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "aten::_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
    "transformers::grouped_mm_fallback_backward": _grouped_mm_backward,
    "aten::addmm_": _addmm,
    "aten::_addmm_activation": _addmm,
    "aten::baddbmm_": _addbmm,
    "aten::addbmm": _addbmm,
    "aten::addbmm_": _addbmm,
    "aten::_int_mm": _mm,
    "aten::mv": _mv,
    "aten::addmv": _addmv,
    "aten::addmv_": _addmv,
    "aten::dot": _mv,
    "aten::vdot": _mv,
    "bitsandbytes::int8_linear_matmul": _int8_scaled_mm,
    "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
    "bitsandbytes::gemv_4bit": _gemm_4bit,
}

_MATMUL_LIKE = re.compile(
    r"(^|_)(mm|addmm|bmm|baddbmm|mv|matmul|einsum|linear|conv\dd|convolution|attention|transformer|rnn|gru|lstm|trilinear|addr)(_|$)"
    r"|(int\d+|grouped|scaled|packed?)_?mm"
)


def missing_formulas() -> dict[OpOverloadPacket, Callable[..., int]]:
    """The formulas that torch lacks, for the `custom_mapping` of `FlopCounterMode`.

    Operations of other libraries are included once those libraries have registered them.
    """
    found = {}
    for name, formula in _FORMULAS.items():
        namespace, _, op = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        if packet is not None:
            found[packet] = formula
    return found


def flop_counter() -> FlopCounterMode:
    """A silent `FlopCounterMode` that also knows the formulas that torch lacks.

    >>> with flop_counter() as counter:
    ...     x @ w                    # x: (3, 4), w: (4, 5)
    >>> counter.get_total_flops()
    120
    """
    return FlopCounterMode(display=False, custom_mapping=missing_formulas())


def looks_like_matmul(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether an operation without a formula probably multiplies matrices, judged by its name and its inputs.

    Operations of torch are judged by name (`aten::_weight_int4pack_mm`, `aten::mkldnn_rnn_layer`), those of other
    libraries also by their inputs: two floating-point tensors of two or more dimensions are suspect.
    """
    if _MATMUL_LIKE.search(func._schema.name.partition("::")[2]):
        return True
    matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > 1 and a.is_floating_point()]
    return func.namespace not in ("aten", "prims", "prim") and len(matrices) > 1


class FlopFormulas:
    """What an operator costs, by the formulas of torch, those of this file, and those that were registered with torch.

    >>> formulas = FlopFormulas()
    >>> formulas.flops(torch.ops.aten.mm.default, (x, w), {}, x @ w)      # x: (3, 4), w: (4, 5)
    120
    """

    def __init__(self) -> None:
        self._formulas: dict[OpOverloadPacket, Callable[..., int]] = {
            **flop_registry,
            **{op: shape_wrapper(f) for op, f in missing_formulas().items()},
        }
        # By the id of an operator, since hashing one is slow.
        self._formula_of: dict[int, Callable[..., int] | None] = {}
        # Formulas are slow, and the shapes are the same in every layer.
        self._flops_of: dict[tuple[int, torch.Size, torch.Size], int] = {}

    def counts_parts(self, func: OpOverload, args: tuple[Any, ...]) -> bool:
        """Whether an operator has no formula and is counted as the operators that it decomposes into.

        Warns of one that has neither and looks like a matrix product.
        """
        return self._formula(func, args) is _decomposed

    def flops(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        """The FLOPs of one call of an operator, which has returned `out`."""
        formula = self._formula(func, args)
        if formula is None:
            return 0
        if id(func) not in _PRODUCTS:
            return formula(*args, **kwargs, out_val=out)
        shapes = (id(func), args[-2].shape, args[-1].shape)
        if shapes not in self._flops_of:
            self._flops_of[shapes] = formula(*args, **kwargs, out_val=out)
        return self._flops_of[shapes]

    def _formula(self, func: OpOverload, args: tuple[Any, ...]) -> Callable[..., int] | None:
        if id(func) not in self._formula_of:
            self._formula_of[id(func)] = self._find(func, args)
        return self._formula_of[id(func)]

    def _find(self, func: OpOverload, args: tuple[Any, ...]) -> Callable[..., int] | None:
        packet = getattr(func, "_overloadpacket", func)
        if packet in self._formulas:
            return self._formulas[packet]
        if isinstance(func, OpOverload):
            if func._can_decompose():
                return _decomposed
            if looks_like_matmul(func, args):
                warnings.warn(
                    f"{func._schema.name} looks like a matrix product but has no FLOP formula, so it counts as free. Add "
                    "one with torch.utils.flop_counter.register_flop_formula.",
                    stacklevel=2,
                )
        return None


# Most of what is costed.
_PRODUCTS = {id(getattr(torch.ops.aten, name).default) for name in ("mm", "addmm", "bmm", "baddbmm")}


def _decomposed(*args: Any, **kwargs: Any) -> int:
    raise AssertionError("marks operators that are counted as their parts")
