"""Attention with a trained bias: the one place where what is trained decides which kernels run.

    >>> with NoticeTrainedBias(operations, lambda: True):       # as CostRecorder does in forward passes
    ...     out = F.scaled_dot_product_attention(q, k, v, attn_mask=position_bias)

On the CPU a bias that requires grad (T5's relative positions, say) takes attention from its fused kernel to plain matrix
products. A pass in which everything is trained sees the products; a step in which the bias is frozen runs the kernel's
backward instead. So both are noted as operations, with their condition: whether any tensor is trained that the gradient of
the bias reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import sdpa_backward_flop_count

from .operations import Operations


class NoticeTrainedBias(TorchFunctionMode):
    """Notes the operations of every attention whose kernel depends on whether its bias is trained.

    Args:
        operations: where they are noted.
        runs_forward: whether what runs now is the forward pass, rather than a backward pass of the user's inside of it.
    """

    def __init__(self, operations: Operations, runs_forward: Callable[[], bool]) -> None:
        super().__init__()
        self.operations = operations
        self.runs_forward = runs_forward

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and torch.is_grad_enabled() and self.runs_forward():
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        def fused(mask: Tensor) -> bool:
            choice = torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, **kwargs)
            return choice != SDPBackend.MATH.value

        if attn_mask is None or not attn_mask.requires_grad or fused(attn_mask) or not fused(attn_mask.detach()):
            return scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **kwargs)

        # Views of this call's own, so that hooks on them see just the gradients that this attention makes.
        q, k, v, attn_mask = (tensor.view_as(tensor) for tensor in (q, k, v, attn_mask))
        out = scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **kwargs)
        backward_flops = sdpa_backward_flop_count(out.shape, q.shape, k.shape, v.shape)
        before = kernel = bias_trained = 0

        def starts(grad: Tensor) -> None:
            nonlocal before, kernel, bias_trained
            before = self.operations.ancestors(grad)
            bias_trained = self.operations.new_operation(0)
            kernel = self.operations.new_operation(backward_flops)
            self.operations.run_only_unless(kernel, bias_trained)

        def reaches_input(grad: Tensor) -> None:
            self.operations.run_only_if(self.operations.ancestors(grad) & ~before, bias_trained)
            self.operations.inherit(grad, kernel)

        def reaches_bias(grad: Tensor) -> None:
            self.operations.run_only_if(self.operations.ancestors(grad) & ~before, bias_trained)
            self.operations.inherit(grad, bias_trained)

        out.register_hook(starts)
        attn_mask.register_hook(reaches_bias)
        for tensor in (q, k, v):
            if tensor.requires_grad:
                tensor.register_hook(reaches_input)
        return out
