"""The planning half alone: what training costs for any `nn.Module`, and which of its tensors pay most.

    python examples/plan_without_peft.py

plans for a small network on the CPU, trains what was selected by hand, and prints the planned and the counted cost.
"""

import torch
from torch import nn

from peft_greentrainer import flop_counter, profile, select


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4608, 64), nn.ReLU()
    ).append(nn.Linear(64, 10))
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)

    # What a step of any of these tensors would cost, from one forward and backward pass.
    graph = profile(model, images, loss_fn=lambda logits, _: nn.functional.cross_entropy(logits, labels))
    print(f"a step of full fine-tuning: {graph.full_flops:,} FLOPs, {graph.forward_flops:,} of them forward")
    print(
        f"the last layer alone costs {graph.ratio(['7.weight', '7.bias']):.4f}; nothing costs less than {graph.floor:.4f}"
    )

    # To first order this is by how much an update of Adam lowers the loss; any other numbers do as well.
    nn.functional.cross_entropy(model(images), labels).backward()
    importance = {name: p.grad.abs().sum().item() for name, p in model.named_parameters()}
    selection = select(graph, importance, rho=0.6)
    print(f"rho 0.6 pays for {', '.join(sorted(selection.tensors))}")

    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selection.tensors)
    with flop_counter() as counter:
        nn.functional.cross_entropy(model(images), labels).backward()
    share = counter.get_total_flops() / graph.full_flops
    print(f"planned {selection.ratio:.4f} of full fine-tuning, counted {share:.4f}")


if __name__ == "__main__":
    main()
