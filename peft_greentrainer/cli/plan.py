"""What training a model within a budget costs and needs, worked out without its weights.

    >>> model = empty_model("HuggingFaceTB/SmolLM2-135M")        # on the meta device: no memory, no arithmetic
    >>> plan = Plan.of(model, empty_batch(model, batch_size=4, seq_len=512), rho=0.5)
    >>> plan.floor
    0.334
    >>> plan.budgets[0.5].weights                                # the most that may be trained at rho 0.5
    52_000_000

Attention is counted as plain matrix products there. A fused kernel computes some of them again in its backward pass,
which is counted where the model really runs (`profile` on its device).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from ..adapter.candidates import Candidates
from ..adapter.config import GreenTrainerConfig
from ..adapter.model_tensors import find_tensors
from ..measuring.profile import profile
from ..planning.graph import CostGraph
from ..planning.selection import select
from ..tensors.names import kind_of


RHOS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LORA_RANK = 8


@dataclass(frozen=True)
class Group:
    """Tensors of one layer, or of one kind over all layers.

    Attributes:
        tensors: how many; weights: numbers in them.
        weight_flops: what their own gradients cost, in a step.
        reach: the smallest ratio at which any of them can be trained.
    """

    tensors: int
    weights: int
    weight_flops: int
    reach: float


@dataclass(frozen=True)
class Budget:
    """The most weights that a rho buys: how many tensors and weights, at which ratio, down to which tensor."""

    tensors: int
    weights: int
    ratio: float
    deepest: str


@dataclass(frozen=True)
class Memory:
    """Bytes of weights, of gradients and of the two moments of AdamW. Activations are not included."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Plan:
    """The costs of one training step of a model. FLOPs are 2 per multiply-add.

    Attributes:
        rho: the budget that was asked for.
        tensors, weights: what the model has; candidates: how many of the tensors may be selected.
        floor: see `CostGraph`.
        forward_flops, activation_flops, weight_flops: of a step of full fine-tuning. Weight gradients are the operations
            that one tensor alone needs.
        layers, kinds: the candidates, grouped.
        budgets: for each rho the most weights that it buys, None under the floor.
        lora_ratio: FLOPs of a step of LoRA (rank 8, all linear layers) over those of full fine-tuning; None where peft
            has no LoRA for all linear layers.
        memory: for "full", "LoRA" (or None) and "rho", the budget that was asked for (None under the floor).
    """

    rho: float
    tensors: int
    weights: int
    candidates: int
    floor: float
    forward_flops: int
    activation_flops: int
    weight_flops: int
    layers: dict[str, Group]
    kinds: dict[str, Group]
    budgets: dict[float, Budget | None]
    lora_ratio: float | None
    memory: dict[str, Memory | None]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        rho: float,
        *,
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Plan:
        """Plan the training of `model`, which may be on the meta device, on batches like this one.

        Args:
            include, exclude: `target_modules` and `exclude_modules` of the config.
            dtype: the type that the weights will have.

        Raises:
            ValueError: a pattern that matches nothing; rho outside (0, 1]; a batch that gives no loss.
        """
        config = GreenTrainerConfig(rho=rho, target_modules=include, exclude_modules=exclude)
        _maybe_include_all_linear_layers(config, model)  # writes them into the config
        graph = profile(model, batch, candidates=Candidates.of(find_tensors(model), config).names)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        budgets = {r: _most_weights(graph, sizes, r) for r in sorted({*RHOS, rho})}

        total, item = sum(sizes.values()), dtype.itemsize
        lora_ratio, lora_weights = _lora(model, batch, graph)
        bought = budgets[rho]
        own = graph.needs.sum(axis=0) == 1
        return cls(
            rho=rho,
            tensors=len(sizes),
            weights=total,
            candidates=len(graph.tensors),
            floor=graph.floor,
            forward_flops=graph.forward_flops,
            activation_flops=graph.full_flops - graph.forward_flops - int(graph.costs[own].sum()),
            weight_flops=int(graph.costs[own].sum()),
            layers=_grouped(graph, sizes, _layer),
            kinds=_grouped(graph, sizes, kind_of),
            budgets=budgets,
            lora_ratio=lora_ratio,
            memory={
                "full": Memory(total * item, total * item, 2 * total * item),
                "LoRA": _with_trained(total * item, lora_weights, item),
                "rho": _with_trained(total * item, bought.weights if bought else None, item),
            },
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def empty_model(source: str) -> PreTrainedModel:
    """The model of a Hub id, a folder or a `config.json`, on the meta device.

    Raises `OSError` where there is no configuration, as transformers does.
    """
    config = AutoConfig.from_pretrained(source)
    if not config.is_encoder_decoder:  # which pads its labels
        config.pad_token_id = None  # transformers would look for padding in inputs that have no values
    name = (config.architectures or [None])[0]
    if name is not None and hasattr(transformers, name):
        make = getattr(transformers, name)._from_config
    else:
        make = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config
    with torch.device("meta"):
        # Masks of the other kernels, and grouped products in float32, are not to be had without values.
        model: PreTrainedModel = make(config, attn_implementation="eager").to(torch.bfloat16)
        return model


def empty_batch(model: Any, batch_size: int, seq_len: int, target_len: int | None = None) -> dict[str, Tensor]:
    """A batch on the meta device, with labels for the head that the model has.

    Args:
        batch_size, seq_len: rows, and tokens in each. Vision models have the image size of their configuration.
        target_len: tokens of a row of labels in encoder-decoder models; default: `seq_len`.

    Raises `ValueError` for a model that takes neither tokens nor images.
    """

    def ids(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device="meta")

    kind = type(model).__name__
    if model.main_input_name == "pixel_values":
        size, channels = model.config.image_size, model.config.num_channels
        pixels = torch.zeros(batch_size, channels, size, size, dtype=torch.bfloat16, device="meta")
        return {"pixel_values": pixels, "labels": ids(batch_size)}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{kind} takes {model.main_input_name}, and a plan can be made for token and image models only: call "
            "peft_greentrainer.profile(model, batch) with a batch of your own."
        )
    inputs = {"input_ids": ids(batch_size, seq_len)}
    if kind.endswith("ForSequenceClassification"):
        model.config.problem_type = "single_label_classification"
        return inputs | {"labels": ids(batch_size)}
    if kind.endswith("ForQuestionAnswering"):
        return inputs | {"start_positions": ids(batch_size), "end_positions": ids(batch_size)}
    return inputs | {
        "labels": ids(batch_size, target_len if target_len and model.config.is_encoder_decoder else seq_len)
    }


def _layer(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> model.layers.3"""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


def _grouped(graph: CostGraph, sizes: Mapping[str, int], group_of: Callable[[str], str]) -> dict[str, Group]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in graph.tensors:
        groups[group_of(name)].append(name)
    alone = graph.needs & (graph.needs.sum(axis=0) == 1)
    return {
        group: Group(
            tensors=len(names),
            weights=sum(sizes[name] for name in names),
            weight_flops=int(graph.costs[alone[graph.rows(names)].any(axis=0)].sum()),
            reach=min(graph.ratio([name]) for name in names),
        )
        for group, names in groups.items()
    }


def _most_weights(graph: CostGraph, sizes: Mapping[str, int], rho: float) -> Budget | None:
    if rho < graph.floor:
        return None
    selection = select(graph, {name: float(sizes[name]) for name in graph.tensors}, rho)
    return Budget(
        tensors=len(selection.tensors),
        weights=_weights(sizes, selection.tensors),
        ratio=selection.ratio,
        deepest=next(name for name in graph.tensors if name in selection.tensors),
    )


def _lora(model: nn.Module, batch: Mapping[str, Tensor], graph: CostGraph) -> tuple[float | None, int | None]:
    """FLOPs of a LoRA step over those of full fine-tuning, and the number of LoRA weights. The model is left wrapped."""
    try:
        wrapped = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear")).get_base_model()
        sizes = {name: p.numel() for name, p in wrapped.named_parameters() if ".lora_" in name}
        lora_graph = profile(wrapped, batch, candidates=sizes)
    except (ValueError, RuntimeError):  # peft has none for Mamba, and its fused experts do not run on the meta device
        return None, None
    return lora_graph.flops(lora_graph.tensors) / graph.full_flops, sum(sizes.values())


def _weights(sizes: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(sizes[name] for name in names)


def _with_trained(base_bytes: int, trained: int | None, item: int) -> Memory | None:
    """A frozen base, and values of their own for the trained weights: at least float32."""
    if trained is None:
        return None
    item = max(item, 4)
    return Memory(base_bytes + trained * item, trained * item, 2 * trained * item)
