"""Keeps the saving where gradient checkpointing is on.

transformers, peft and trl make the output of the embeddings require grad, for reentrant checkpointing, which passes on
gradients only to inputs that require grad. Every activation gradient is then computed, whatever is trained: a planned share
of 0.36 becomes 0.92. Checkpointing that is not reentrant needs nothing of that.
"""

from __future__ import annotations

from torch import nn


REENTRANT = (
    "Reentrant gradient checkpointing computes every activation gradient, so that a step costs nearly as much as one of full "
    "fine-tuning, whatever is trained. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
)
# The hooks of transformers, peft and trl by name: each enabling installs another one and forgets the one before.
HOOKS = ("make_inputs_require_grad", "make_inputs_require_grads")


def is_reentrant(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on in some module of the model, and of the reentrant kind."""
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in _checkpointing(model))


def remove_hooks(model: nn.Module) -> None:
    """Remove the hooks that make inputs require grad, if checkpointing is on, and nowhere reentrant."""
    if not _checkpointing(model) or is_reentrant(model):
        return
    for module in model.modules():
        for handle, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in HOOKS:
                del module._forward_hooks[handle]


def _checkpointing(model: nn.Module) -> list:
    """What runs the modules in which checkpointing is on."""
    # Not by attribute access, for which a wrapper would ask its module.
    states = [vars(module) for module in model.modules()]
    return [state["_gradient_checkpointing_func"] for state in states if state.get("gradient_checkpointing") is True]
