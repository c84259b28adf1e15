"""FLOP formulas that `torch.utils.flop_counter` lacks, and a counter that has them.

    >>> with flop_counter() as counter:
    ...     model(**batch).loss.backward()
    >>> counter.get_total_flops()        # 2 FLOPs per multiply-add

Without them, attention on the CPU, fused experts and in-place matrix products count as free: 5 to 75 % of a model.
Formulas take shapes, as those of `torch.utils.flop_counter.flop_registry` do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    bmm_flop,
    mm_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


def _attention(q, k, v, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad_out, q, k, v, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, q, k, v)


def _grouped_mm(a, b, *args, out_shape=None, **kwargs) -> int:
    # Each of the M rows of a 2-D `a` (M, K) meets one group of `b` (G, K, N); with both 2-D the groups split K.
    groups = a[0] if len(a) == 3 and len(b) == 3 else 1
    return 2 * groups * prod(a[-2:]) * b[-1]


def _grouped_mm_backward(a, b, offs, grad_out, *args, out_shape=None, **kwargs) -> int:
    return 2 * _grouped_mm(a, b)


def _addmm(self, a, b, *args, out_shape=None, **kwargs) -> int:
    return mm_flop(a, b)


def _addbmm(self, a, b, *args, out_shape=None, **kwargs) -> int:
    return bmm_flop(a, b)


def _mm(a, b, *args, out_shape=None, **kwargs) -> int:
    return mm_flop(a, b)


def _mv(a, x, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(a)


def _addmv(self, a, x, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(a)


def _int8_scaled_mm(a, b, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(a) * b[0]  # b: (N, K)


def _int8_mixed_scaled_mm(a, quantized_a, b, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(a) * b[0]


def _gemm_4bit(a, packed, shape, *args, out_shape=None, **kwargs) -> int:
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


def missing_formulas() -> dict[torch._ops.OpOverloadPacket, Callable[..., int]]:
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


def looks_like_matmul(func: torch._ops.OpOverload, args: tuple) -> bool:
    """Whether an operation without a formula probably multiplies matrices, judged by its name and its inputs.

    Operations of torch are judged by name (`aten::_weight_int4pack_mm`, `aten::mkldnn_rnn_layer`), those of other
    libraries also by their inputs: two floating-point tensors of two or more dimensions are suspect.
    """
    if _MATMUL_LIKE.search(func._schema.name.partition("::")[2]):
        return True
    matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > 1 and a.is_floating_point()]
    return func.namespace not in ("aten", "prims", "prim") and len(matrices) > 1
