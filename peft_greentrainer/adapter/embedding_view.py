"""What `get_input_embeddings` and `get_output_embeddings` of a wrapped model give.

>>> hidden = model.get_input_embeddings()(input_ids)     # of the tensors that are being trained
"""

from __future__ import annotations

from typing import Any, SupportsIndex, cast

from torch import nn

from .layer import GreenTrainerLayer
from .same_class import new_with_class_of


class EmbeddingView(nn.Module):
    """A wrapper of an embedding or a head as others see it: its effective tensors, its hooks, and no tuner layer.

    trl refuses a tuner layer as the head, whose weight it reads. And peft saves the base tensors of an embedding that is
    a tuner layer, here only where no value takes their place.
    """

    layer: GreenTrainerLayer
    _stands_for: tuple[type, type]  # see `same_class`

    def __new__(cls, layer: GreenTrainerLayer) -> EmbeddingView:
        return cast(EmbeddingView, new_with_class_of(cls, type(layer.base_layer)))

    def __init__(self, layer: GreenTrainerLayer) -> None:
        nn.Module.__init__(self)
        hooks = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
        self.__dict__ |= {f"register_{kind}": getattr(layer, f"register_{kind}") for kind in hooks}
        self.__dict__["layer"] = layer  # a part of the model, not of this

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return new_with_class_of, type(self)._stands_for, self.__dict__

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value) if "layer" not in self.__dict__ else setattr(self.layer, name, value)

    def __getattr__(self, name: str) -> Any:
        return self._attribute(name)

    def _attribute(self, name: str) -> Any:
        layer = self.__dict__["layer"]
        if name == "base_layer":  # peft looks for it among the modules of the model, where the wrapper stands for it
            if any("weight" in layer.changed_tensors(adapter) for adapter in layer.active_adapters):
                raise AttributeError(name)
            return layer
        return getattr(layer, name)
