"""The table that `peft-greentrainer plan` prints.

>>> print("\n".join(lines_of(plan)))
"""

from __future__ import annotations

from collections.abc import Iterator

from .plan import LORA_RANK, Memory, Plan


def lines_of(plan: Plan) -> Iterator[str]:
    full = plan.forward_flops + plan.activation_flops + plan.weight_flops
    yield f"{plan.weights / 1e6:,.1f} million weights in {plan.tensors} tensors, {plan.candidates} of them candidates"
    yield f"floor {plan.floor:.4f}: the smallest rho at which anything can be trained"
    yield ""
    yield f"{'a step of full fine-tuning':34}{'GFLOPs':>12}{'share':>9}"
    for name, flops in [
        ("forward", plan.forward_flops),
        ("activation gradients", plan.activation_flops),
        ("weight gradients", plan.weight_flops),
        ("in all", full),
    ]:
        yield f"  {name:32}{flops / 1e9:12,.1f}{flops / full:9.4f}"

    for title, groups in (("by kind", plan.kinds), ("by layer", plan.layers)):
        width = max(34, *(len(name) + 3 for name in groups))
        yield ""
        yield f"{title:{width}}{'tensors':>9}{'millions':>12}{'gradient':>11}{'from rho':>10}"
        for name, group in groups.items():
            yield (
                f"  {name:{width - 2}}{group.tensors:9}{group.weights / 1e6:12,.3f}{group.weight_flops / full:11.4f}"
                f"{group.reach:10.4f}"
            )
    yield "  gradient: share of a full step that their weight gradients cost; from rho: where the first can be trained"

    yield ""
    yield f"{'what rho buys: the most weights':34}{'tensors':>9}{'millions':>12}{'planned':>11}  down to"
    for rho, budget in plan.budgets.items():
        if budget is None:
            yield f"  {rho:<32}    under the floor"
        else:
            yield (f"  {rho:<32}{budget.tensors:9}{budget.weights / 1e6:12,.3f}{budget.ratio:11.4f}  {budget.deepest}")

    yield ""
    yield f"{'GB, activations not included':34}{'weights':>9}{'gradients':>11}{'AdamW':>8}{'in all':>8}{'FLOPs':>9}"
    asked_for = plan.budgets[plan.rho]
    for name, memory, share in [
        ("full fine-tuning", plan.memory["full"], 1.0),
        (f"LoRA, rank {LORA_RANK}, all linear layers", plan.memory["LoRA"], plan.lora_ratio),
        (f"rho {plan.rho}, the most weights", plan.memory["rho"], asked_for and asked_for.ratio),
    ]:
        if memory is not None:
            yield f"  {name:32}{_gigabytes(memory)}{share:9.4f}"


def _gigabytes(memory: Memory) -> str:
    numbers = zip((9, 11, 8, 8), (memory.weights, memory.gradients, memory.optimizer, memory.total))
    return "".join(f"{value / 1e9:{width}.2f}" for width, value in numbers)
