"""Runs the backbone of a causal language model in two passes: over the prompts, and over the answers.

>>> with SplitBackbone(model, "keys") as split:
...     model(input_ids=ids, labels=labels).loss.backward()      # the same loss; gradients reach the prompt's keys only
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .blocks import blocks_of, one_hop, without_checkpointing
from .cache import let_only_read
from .layout import Layout, reads_padding


PromptGradient = Literal["full", "keys", "none"]

# What is cut into prompts and answers, and what says how to run rather than on what.
SPLIT = ("input_ids", "attention_mask", "position_ids")
OPTIONS = ("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits")
ASKS_FOR_MORE = ("output_attentions", "output_hidden_states", "output_router_logits")
# What models call their caches.
CACHES = ("past_key_values", "cache_params")
# Positions are told by the place of a token in its row, or worked out by the model from mask and cache.
SCHEMES = ("place", "own")
# How far outputs may be off, over the largest.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class _Running:
    """A pass over answers that has begun: where they are, the outputs of the prompts, and the length of a row."""

    layout: Layout
    prompts: Tensor
    length: int
    contexts: ExitStack


class SplitBackbone:
    """
    Args:
        model: a causal language model of transformers.
        prompt_gradient: how far gradients go into the prompt.
    """

    def __init__(self, model: PreTrainedModel, prompt_gradient: PromptGradient) -> None:
        self.model = model
        self.prompt_gradient = prompt_gradient
        self.backbone = model.get_decoder()
        self.splits = 0
        self.why_not: str | None = None
        self._takes = inspect.signature(self.backbone.forward).parameters
        self._labels: Tensor | None = None
        self._running: _Running | None = None
        self._is_inside = False
        self._verified: dict[Any, str | None] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> SplitBackbone:
        forward = self.model.forward

        def with_labels(*args: Any, **kwargs: Any) -> Any:
            self._labels = kwargs.get("labels")
            try:
                return forward(*args, **kwargs)
            finally:
                self._labels = None
                if self._running is not None:  # the backbone raised
                    self._running.contexts.close()
                    self._running = None

        self.model.forward = with_labels
        self._hooks.callback(lambda: self.model.__dict__.pop("forward"))
        self._hooks.callback(self.backbone.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        self._hooks.callback(self.backbone.register_forward_hook(self._after, with_kwargs=True).remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()

    def _before(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if self._is_inside or not torch.is_grad_enabled():
            return None
        given = dict(inspect.signature(backbone.forward).bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        given = {name: value for name, value in given.items() if value is not None}
        self.why_not = self._reason(given)
        if self.why_not is not None:
            return None
        layout = Layout.of(self._labels, given.get("attention_mask"))
        if reads_padding(self._labels, given.get("attention_mask")):
            self.why_not = "the loss reads the output of padding, which a split step does not compute"
            return None
        if not layout.prompt_mask.any():
            self.why_not = "the loss reads the output of every token: there is no prompt"
            return None
        scheme = self._scheme(given, layout)
        if scheme is None:
            self.why_not = f"{type(backbone).__name__} gives other outputs where it is run in two passes"
            return None
        self._is_inside = True
        try:
            with self._prompt_pass():
                prompts = self._run_prompts(given, layout, scheme)
        finally:
            self._is_inside = False
        self._running = _Running(layout, prompts.last_hidden_state.detach(), given["input_ids"].shape[1], ExitStack())
        self._running.contexts.enter_context(without_checkpointing(self.backbone))
        self.splits += 1
        return (), self._answers(given, layout, scheme, prompts)

    def _after(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self._is_inside or self._running is None:
            return None
        running, self._running = self._running, None
        running.contexts.close()
        output.last_hidden_state = running.layout.put_back(running.prompts, output.last_hidden_state, running.length)
        for name in CACHES:
            if getattr(output, name, None) is not None:
                output[name] = None
        return output

    def _reason(self, given: dict[str, Any]) -> str | None:
        """Why this call is run as it is."""
        if self._labels is None:
            return "the model is called without labels"
        if not isinstance(given.get("input_ids"), Tensor):
            return "the model is called without input_ids"
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            return "attention_mask has more than two dimensions"
        unknown = [name for name in given if name not in SPLIT and name not in OPTIONS]
        if unknown:
            return f"it is not known what {', '.join(unknown)} mean for a part of the tokens"
        asked = [name for name in ASKS_FOR_MORE if given.get(name)]
        return f"{', '.join(asked)} was asked for" if asked else None

    def _scheme(self, given: dict[str, Any], layout: Layout) -> str | None:
        """How positions have to be given so that the outputs are those of one pass; None if they never are."""
        is_ragged = not (layout.prompt_mask.all() and layout.answer_mask.all())
        form = (*sorted(given), is_ragged, torch.is_autocast_enabled(given["input_ids"].device.type))
        if form not in self._verified:
            self._verified[form] = next((s for s in SCHEMES if self._is_equal(given, layout, s)), None)
        return self._verified[form]

    @torch.no_grad()
    def _is_equal(self, given: dict[str, Any], layout: Layout, scheme: str) -> bool:
        if scheme != "own" and "position_ids" not in self._takes:
            return False
        self._is_inside = True
        training = {module: module.training for module in self.backbone.modules()}
        try:
            self.backbone.eval()
            with torch.random.fork_rng(devices=[]):
                expected = self.backbone(**given | {"use_cache": False, "return_dict": True}).last_hidden_state
                prompts = self._run_prompts(given, layout, scheme)
                answers = self.backbone(**self._answers(given, layout, scheme, prompts)).last_hidden_state
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as e:
            self.error = f"{type(e).__name__}: {e}"
            return False
        finally:
            for module, mode in training.items():
                module.training = mode
            self._is_inside = False
        found = layout.put_back(prompts.last_hidden_state, answers, expected.shape[1])
        tokens = (
            layout.put_back(
                *(m[..., None].float() for m in (layout.prompt_mask, layout.answer_mask)), expected.shape[1]
            )[..., 0]
            > 0
        )
        scale = expected[tokens].abs().max()
        self.error = f"{scheme} off by {((found - expected)[tokens].abs().max() / scale).item():.1e}"
        return bool(((found - expected)[tokens].abs().max() <= TOLERANCE[_precision(expected)] * scale).item())

    def _run_prompts(self, given: dict[str, Any], layout: Layout, scheme: str) -> Any:
        inputs = {
            "input_ids": given["input_ids"].gather(1, layout.prompt_index),
            "attention_mask": layout.prompt_mask.long(),
        }
        inputs |= self._positions(given, layout.prompt_index, scheme)
        return self.backbone(**self._others(given) | inputs)

    def _answers(self, given: dict[str, Any], layout: Layout, scheme: str, prompts: Any) -> dict[str, Any]:
        name = next(name for name in CACHES if getattr(prompts, name, None) is not None)
        cache = getattr(prompts, name)
        let_only_read(cache)
        mask = layout.joined_mask if name == "past_key_values" else layout.answer_mask.long()
        inputs = {"input_ids": given["input_ids"].gather(1, layout.answer_index), "attention_mask": mask, name: cache}
        return self._others(given) | inputs | self._positions(given, layout.answer_index, scheme)

    def _others(self, given: dict[str, Any]) -> dict[str, Any]:
        options = {name: value for name, value in given.items() if name in OPTIONS}
        return options | {"use_cache": True, "return_dict": True}

    def _positions(self, given: dict[str, Any], index: Tensor, scheme: str) -> dict[str, Tensor]:
        if "position_ids" in given:
            return {"position_ids": given["position_ids"].expand(given["input_ids"].shape).gather(1, index)}
        if scheme == "place":
            return {"position_ids": index}
        return {}

    @contextmanager
    def _prompt_pass(self) -> Iterator[None]:
        with without_checkpointing(self.backbone):
            if self.prompt_gradient == "keys":
                with one_hop(blocks_of(self.backbone)):
                    yield
            else:
                # A cast of a weight that autocast keeps from a pass without gradients has no history (pytorch#112583).
                with torch.no_grad(), _autocast_keeps_nothing():
                    yield


def _precision(output: Tensor) -> torch.dtype:
    device = output.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype


@contextmanager
def _autocast_keeps_nothing() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
