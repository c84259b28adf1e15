"""Keeps the saving where gradient checkpointing is on.

transformers, peft and trl make the output of the embeddings require grad, for reentrant checkpointing, which passes on
gradients only to inputs that require grad. Every activation gradient is then computed, whatever is trained: a planned share
of 0.36 becomes 0.92. Checkpointing that is not reentrant needs nothing of that.
"""

from __future__ import annotations

from torch import nn

from ..adapter.layer import base_layer_of


REENTRANT = (
    "Reentrant gradient checkpointing computes every activation gradient, so that a step costs nearly as much as one of full "
    "fine-tuning, whatever is trained. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
)
# The hooks of transformers, peft and trl by name: each enabling installs another one and forgets the one before.
HOOKS = ("make_inputs_require_grad", "make_inputs_require_grads")


def can_save(model: nn.Module) -> bool:
    """Remove the hooks that make inputs require grad, if checkpointing is on; false, and none removed, if it is reentrant."""
    # Not by attribute access, for which a wrapper would ask its module.
    states = [vars(module) for wrapper in model.modules() for module in {wrapper, base_layer_of(wrapper)}]
    runs = [state["_gradient_checkpointing_func"] for state in states if state.get("gradient_checkpointing") is True]
    if any(getattr(run, "keywords", {}).get("use_reentrant", True) for run in runs):
        return False
    for hooks in [state["_forward_hooks"] for state in states if runs]:
        for handle, hook in list(hooks.items()):
            if getattr(hook, "__name__", "") in HOOKS:
                del hooks[handle]
    return True
