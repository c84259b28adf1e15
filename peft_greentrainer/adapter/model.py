"""GreenTrainerTuner: what peft asks of a method, all but the training itself."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional, cast

from peft.config import PeftConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import TaskType
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from ..tensors.names import base_name, candidates_in, is_low_rank, low_rank_form
from .candidates import Candidates, drop_candidates, keep_candidates, stop_keeping_candidates
from .config import GreenTrainerConfig
from .embedding_view import EmbeddingView
from .fingerprint import ELSEWHERE, check_fingerprint
from .layer import GreenTrainerLayer
from .linear import GreenTrainerLinear, wrap
from .model_tensors import find_tensors, left_out, named_modules
from .provisional import provisional_selection, warn_if_never_selected
from .refusals import (
    frozen_before,
    refuse_names_of_modules,
    refuse_offloaded,
    refuse_wrapped_heads,
    tell_of_frozen,
    tell_of_left_out,
    tell_of_quantized,
)
from .resizing import allow_resizing, refuse_resizing
from .save_and_load import SavedTuner, wait_for_file
from .shared_tensors import stop_reading
from .targets import TASK_HEADS, matches
from .values import add_value, fingerprint_of, layers


class GreenTrainerTuner(SavedTuner):
    """Wraps the modules that own candidate tensors, saves and loads their values, merges them. It knows nothing of cost."""

    # Of the adapter that is being injected: what it may train, and the modules to wrap for that, by the names that they have
    # here, with those that they have in the base model.
    _candidates: Candidates
    _keys: dict[str, str]

    prefix: str = "greentrainer_"
    tuner_layer_cls = GreenTrainerLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        """Forward missing attributes to the model; the embeddings that it gives are no tuner layers."""
        value = super().__getattr__(name)
        return partial(_viewed, value) if name in ("get_input_embeddings", "get_output_embeddings") else value

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Optional[list[str]] = None, **kwargs: Any
    ) -> Iterator[None]:
        if adapter_names is not None:
            raise ValueError("GreenTrainer has no batches of several adapters (adapter_names): call set_adapter.")
        yield

    # What peft's injection asks for

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Optional[dict[str, Tensor]] = None,
    ) -> None:
        config = cast(GreenTrainerConfig, self.peft_config[adapter_name])
        if any(other is config for name, other in self.peft_config.items() if name != adapter_name):
            # Another adapter of the same tensors: trl copies one so, value by value.
            self.peft_config[adapter_name] = config = dataclasses.replace(config, spent=None)
        config.refuse_single_rows()
        refuse_names_of_modules(model, self.peft_config)
        config.forget_earlier_model()
        if state_dict is not None:
            names = candidates_in(state_dict, named_modules(model))
            config.tensors = {name: (config.tensors or {}).get(name) for name in names}
            config.provisional = False
        is_saved = config.tensors is not None
        # Which modules to wrap follows from the config also where the file is at hand: tied tensors are read by
        # modules that the file does not name.
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        keep_candidates(model, adapter_name, self._candidates)
        self._tie(model)
        if is_saved:
            wait_for_file(model, adapter_name)
        refuse_resizing(model)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast(GreenTrainerConfig, peft_config)
        heads = TASK_HEADS.get(cast(TaskType, config.task_type), ())
        if heads:
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
        # peft does this too, but only after `_prepare_model`, and by the names that modules have in a compiled model.
        _maybe_include_all_linear_layers(config, self.model)
        if isinstance(config.target_modules, set):
            config.target_modules = set(map(base_name, config.target_modules))
        return config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        config = cast(GreenTrainerConfig, peft_config)
        found = find_tensors(model)
        if config.tensors is None:
            if config.frozen is None:
                config.frozen = frozen_before(model, found, cast(Iterable[PeftConfig], self.peft_config.values()))
            tell_of_frozen(found, config)
        self._candidates = Candidates.of(found, config)
        innermost = {base_name(key): key for key, _ in model.named_modules()}  # of what torch.compile puts around it
        self._keys = {innermost[module]: module for module in self._candidates.owned}
        self._holders = _holders(model)
        refuse_offloaded(model, self._candidates.owned)
        refuse_wrapped_heads(model, config)
        tell_of_quantized(model, self._candidates.names)
        tell_of_left_out(left_out(model))
        if config.tensors is None:
            config.selected = provisional_selection(model, found, self._candidates.names, config)
            config.tensors = dict.fromkeys(config.selected)
            config.provisional = True
        if config.selected is None:
            config.selected = list(config.tensors)
        self._take_fingerprints(config, model)

    def _take_fingerprints(self, config: GreenTrainerConfig, model: nn.Module) -> None:
        """Write fingerprints of the base tensors into the config.

        Raise `ValueError` if the adapter changes what is no candidate here, or has fingerprints of another base.
        """
        names = {other: name for name, tied in self._candidates.tied.items() for other in tied}
        known, modules, tensors = set(self._candidates.names), named_modules(model), config.tensors or {}
        for name, expected in tensors.items():
            if name not in known:
                reason = f"is tied to {names[name]}" if name in names else "is not a candidate tensor of this model"
                if is_low_rank(name) and not config.low_rank:
                    raise ValueError(
                        f"This delta changes {name}, and low_rank is False here: load it with the config that was saved with it."
                    )
                raise ValueError(f"This delta changes {name}, which {reason}. {ELSEWHERE}")
            tensors[name] = fingerprint_of(name, self._candidates, modules)
            if expected is not None:
                check_fingerprint(name, expected, tensors[name])

    def _check_target_module_exists(  # type: ignore[override]  # peft's is static, and asked of the tuner
        self, peft_config: PeftConfig, key: str
    ) -> Any:
        if key in self._keys:
            return True
        matched = matches(cast(GreenTrainerConfig, peft_config), base_name(key))
        # peft wants to see its marker of an excluded module; a module that matches and owns no candidate is no target.
        return False if matched else matched

    # peft warns of tied embeddings, and where they are merged; here a tied tensor has one owner, and the others read
    # through it. `modules_to_save` does untie one.

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        config = cast(GreenTrainerConfig, peft_config)
        if config.modules_to_save:
            super()._check_tied_modules(model, dataclasses.replace(config, target_modules=None))

    def _check_merge_allowed(self) -> None:
        pass

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        config = cast(GreenTrainerConfig, peft_config)
        if isinstance(target, GreenTrainerLayer):
            layer = target
            layer.add_adapter(adapter_name)
        else:
            layer = wrap(target, adapter_name)
            self._replace_module(parent, target_name, layer, target)
        if isinstance(layer, GreenTrainerLinear):
            layer.low_rank_forms[adapter_name] = config.form
        key = self._keys[current_key]
        names = [form for name in self._candidates.owned[key] for form in (name, low_rank_form(name))]
        for name in names:
            if f"{key}.{name}" in (config.tensors or ()):
                add_value(layer, adapter_name, f"{key}.{name}", config.init_weights)
        selected = {name for name in names if f"{key}.{name}" in (config.selected or ())}
        trainable = adapter_name in self.active_adapters and not config.inference_mode
        layer.set_selected(adapter_name, selected, trainable, config.provisional)

    def _tie(self, model: nn.Module) -> None:
        """Let whatever is tied to a candidate read it from its wrapper."""
        wrappers, modules = layers(model), named_modules(model)
        for key, read in self._candidates.read.items():
            for name, owner in read.items():
                wrappers[key].read_from(name, wrappers[owner.module], owner.name)
        for reader, owner in self._candidates.read_by_others:
            wrappers[owner.module].let_read(owner.name, modules[reader.module], reader.name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        drop_candidates(self.model, adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        for holder, name in self._holders[id(child)]:
            setattr(holder, name, new_module)
            if isinstance(holder, OptimizedModule):  # which has bound the call of what it compiled
                holder._initialize()
        self._holders[id(new_module)] = self._holders[id(child)]

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        """Merge, as peft does; with `safe_merge`, look at every layer before the first is written."""
        if safe_merge:
            self._refuse_broken(adapter_names)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(  # type: ignore[override]  # peft's returns the model too, whatever it says
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
    ) -> nn.Module:
        if merge and safe_merge:
            self._refuse_broken(adapter_names)
        self._holders = _holders(self.model)
        for adapter_name in self.active_adapters:
            warn_if_never_selected(self.model, adapter_name)
        unload: Callable[..., nn.Module] = super()._unload_and_optionally_merge  # type: ignore[assignment]  # as above
        base = unload(merge, progressbar, adapter_names=adapter_names)
        stop_keeping_candidates(base)
        for module in base.modules():
            stop_reading(module)
        allow_resizing(base)
        return base

    def _refuse_broken(self, adapter_names: Optional[list[str]]) -> None:
        for layer in layers(self.model).values():
            layer.refuse_broken(adapter_names)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in layers(self.model).values():
            if adapter_name in layer.greentrainer_values:
                layer.set_value_dtype(adapter_name, float32=autocast_adapter_dtype)


def _viewed(get_embeddings: Callable[[], Optional[nn.Module]]) -> Optional[nn.Module]:
    embeddings = get_embeddings()
    return EmbeddingView(embeddings) if isinstance(embeddings, GreenTrainerLayer) else embeddings


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place in the model where a module is a child: a module object can have several parents."""
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent.named_children():
            holders[id(child)].append((parent, name))
    return holders
