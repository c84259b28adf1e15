"""A model whose embedding or head is wrapped keeps them: trained values have the size of the base tensor.

    >>> refuse_resizing(base)                         # once it is wrapped
    >>> base.resize_token_embeddings(50_304)
    ValueError: resize_token_embeddings would change model.embed_tokens and lm_head, which an adapter has wrapped. ...
    >>> allow_resizing(base)                          # once it is not any more

What changes nothing (the size that there is, an embedding or a head that no adapter has wrapped) is done as ever.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .embedding_view import EmbeddingView
from .layer import GreenTrainerLayer


def refuse_resizing(model: nn.Module) -> None:
    """Let the transformers models in a model refuse to put other embeddings and heads in place of wrapped ones.

    Three of their methods are hidden by functions on the instance: transformers would put a new module in place of the
    wrapper, and what was trained would be lost without a word. Other models, and the classes, stay as they are.
    """
    for module in model.modules():
        for name, method in _METHODS.items():
            if hasattr(type(module), name):
                # A partial of a function goes with the model into copies and pickles, and is then about the copy.
                vars(module)[name] = partial(method, module)


def allow_resizing(model: nn.Module) -> None:
    """Let them do so again, as their classes do."""
    for module in model.modules():
        for name, method in _METHODS.items():
            if getattr(vars(module).get(name), "func", None) is method:
                del vars(module)[name]


def _resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
    rows = _rows_after(model, *args, **kwargs)
    parts = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    changed = [part for part in parts if len(part.weight) != rows]
    _refuse_wrapped("resize_token_embeddings", model, changed)
    if not changed and any(map(_is_wrapped, parts)):
        # Models set what they have, and where tensors are tied in other places too.
        return model.get_input_embeddings()
    return type(model).resize_token_embeddings(model, *args, **kwargs)


def _rows_after(
    model: Any,
    new_num_tokens: Optional[int] = None,
    pad_to_multiple_of: Optional[int] = None,
    *_: Any,
    **__: Any,
) -> int:
    rows = len(model.get_input_embeddings().weight) if new_num_tokens is None else new_num_tokens
    return rows if pad_to_multiple_of is None else -(-rows // pad_to_multiple_of) * pad_to_multiple_of


def _set_input_embeddings(model: Any, *args: Any, **kwargs: Any) -> None:
    if not _is_kept("set_input_embeddings", model, model.get_input_embeddings(), *args, *kwargs.values()):
        type(model).set_input_embeddings(model, *args, **kwargs)


def _set_output_embeddings(model: Any, *args: Any, **kwargs: Any) -> None:
    if not _is_kept("set_output_embeddings", model, model.get_output_embeddings(), *args, *kwargs.values()):
        type(model).set_output_embeddings(model, *args, **kwargs)


def _is_kept(method: str, model: nn.Module, present: Optional[nn.Module], value: nn.Module) -> bool:
    """Whether a wrapped part of the model is set to what it is; raise `ValueError` where it is set to another."""
    if isinstance(value, EmbeddingView):  # what the wrapped model gives
        value = value.layer
    if value is present:
        return _is_wrapped(present)
    _refuse_wrapped(method, model, [present])
    return False


def _is_wrapped(part: Optional[nn.Module]) -> bool:
    return isinstance(part, (GreenTrainerLayer, AuxiliaryTrainingWrapper))


def _refuse_wrapped(method: str, model: nn.Module, parts: list[nn.Module | None]) -> None:
    wrapped = list(filter(_is_wrapped, parts))
    names = [name for name, module in model.named_modules() if any(module is part for part in wrapped)]
    if names:
        raise ValueError(
            f"{method} would change {' and '.join(names)}, which an adapter has wrapped: trained values have the size of "
            "the base tensor. Change the base model before it is wrapped, and then call get_peft_model or add_adapter; if "
            "something was trained already, call merge_and_unload first. Or leave these modules to the base model: "
            f"exclude_modules={[name.rpartition('.')[2] for name in names]}, and not in modules_to_save."
        )


_METHODS = {
    "resize_token_embeddings": _resize_token_embeddings,
    "set_input_embeddings": _set_input_embeddings,
    "set_output_embeddings": _set_output_embeddings,
}
