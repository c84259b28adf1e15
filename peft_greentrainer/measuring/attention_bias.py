"""Attention with a trained bias: the one place where what is trained decides which kernels run.

    >>> with NoticeTrainedBias(recorder):             # as CostRecorder does
    ...     out = F.scaled_dot_product_attention(q, k, v, attn_mask=position_bias)

On the CPU a bias that requires grad (T5's relative positions, say) takes attention from its fused kernel to plain matrix
products. A pass in which everything is trained sees the products; a step in which the bias is frozen runs the kernel's
backward instead. So the recorder is told of both, and of the condition: whether any tensor is trained that the gradient
of the bias reaches.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import sdpa_backward_flop_count


class Recorder(Protocol):
    """What is asked of a recorder: sets of operations are ints, bit by bit."""

    runs_forward: bool

    def new_operation(self, cost: int) -> int: ...
    def ancestors(self, tensor: Tensor) -> int: ...
    def inherit(self, tensor: Tensor, ancestors: int) -> None: ...
    def run_only_if(self, operations: int, condition: int) -> None: ...
    def run_only_unless(self, operations: int, condition: int) -> None: ...


class NoticeTrainedBias(TorchFunctionMode):
    """While active, tells a recorder of every attention whose kernel depends on whether its bias is trained."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and torch.is_grad_enabled() and self.recorder.runs_forward:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs: Any
    ):
        def fused(mask: Tensor) -> bool:
            choice = torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, **kwargs)
            return choice != SDPBackend.MATH.value

        trained = attn_mask is not None and attn_mask.requires_grad
        if not trained or fused(attn_mask) or not fused(attn_mask.detach()):
            return scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **kwargs)

        # Views of this call's own, so that hooks on them see just the gradients that this attention makes.
        q, k, v, attn_mask = (tensor.view_as(tensor) for tensor in (q, k, v, attn_mask))
        out = scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **kwargs)
        backward_flops = sdpa_backward_flop_count(out.shape, q.shape, k.shape, v.shape)
        before = kernel = bias_trained = 0

        def starts(grad: Tensor) -> None:
            nonlocal before, kernel, bias_trained
            before = self.recorder.ancestors(grad)
            bias_trained = self.recorder.new_operation(0)
            kernel = self.recorder.new_operation(backward_flops)
            self.recorder.run_only_unless(kernel, bias_trained)

        def reaches_input(grad: Tensor) -> None:
            self.recorder.run_only_if(self.recorder.ancestors(grad) & ~before, bias_trained)
            self.recorder.inherit(grad, kernel)

        def reaches_bias(grad: Tensor) -> None:
            self.recorder.run_only_if(self.recorder.ancestors(grad) & ~before, bias_trained)
            self.recorder.inherit(grad, bias_trained)

        out.register_hook(starts)
        attn_mask.register_hook(reaches_bias)
        for tensor in (q, k, v):
            if tensor.requires_grad:
                tensor.register_hook(reaches_input)
        return out
