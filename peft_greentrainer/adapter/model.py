"""GreenTrainerTuner: what peft asks of a method, all but the training itself."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from torch import Tensor, nn

from ..tensors.names import PREFIX, base_name, candidates_in, is_low_rank, low_rank_form
from .candidates import TASK_HEADS, left_out, matches, plan_wrappers, readers
from .config import GreenTrainerConfig
from .embedding_view import EmbeddingView
from .fingerprint import ELSEWHERE, check_fingerprint, fingerprint
from .layer import GreenTrainerLayer
from .linear import GreenTrainerLinear, wrap
from .provisional import provisional_selection
from .refusals import note_frozen, refuse_offloaded, refuse_wrapped_heads, tell_of_left_out, tell_of_quantized
from .resizing import allow_resizing, refuse_resizing
from .shared_tensors import stop_reading
from .state import EXTRA_STATE
from .values import (
    add_value,
    candidate_tensors,
    follow_layers,
    layers,
    let_all_require_grad,
    set_selection,
    set_values,
    warn_if_never_selected,
)


class GreenTrainerTuner(BaseTuner):
    """Wraps the modules that own candidate tensors, saves and loads their values, merges them. It knows nothing of cost."""

    prefix: str = "greentrainer_"
    tuner_layer_cls = GreenTrainerLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        """Forward missing attributes to the model; the embeddings that it gives are no tuner layers."""
        value = super().__getattr__(name)
        return partial(_viewed, value) if name in ("get_input_embeddings", "get_output_embeddings") else value

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Optional[list[str]] = None, **kwargs: Any):
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
        config = self.peft_config[adapter_name]
        if any(other is config for name, other in self.peft_config.items() if name != adapter_name):
            # Another adapter of the same tensors: trl copies one so, value by value.
            self.peft_config[adapter_name] = config = dataclasses.replace(config, spent=None)
        config.refuse_single_rows()
        config.take_for_a_model()
        if state_dict is not None:
            modules = {base_name(key) for key, _ in model.named_modules()}
            names = candidates_in(state_dict, modules)
            config.tensors = {name: (config.tensors or {}).get(name) for name in names}
            config.provisional = False
        # Which modules to wrap follows from the config also where the file is at hand: tied tensors are read by
        # modules that the file does not name.
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        for holder, name, owner, owned in self._readers:
            model.get_submodule(owner).let_read(owned, holder, name)
        refuse_resizing(model)

    def _prepare_adapter_config(self, peft_config: GreenTrainerConfig, model_config: dict) -> GreenTrainerConfig:
        heads = TASK_HEADS.get(peft_config.task_type, ())
        if heads:
            peft_config.modules_to_save = list(dict.fromkeys([*(peft_config.modules_to_save or []), *heads]))
        # peft does this too, but only after `_prepare_model`.
        return _maybe_include_all_linear_layers(peft_config, self.model)

    def _prepare_model(self, peft_config: GreenTrainerConfig, model: nn.Module) -> None:
        if peft_config.tensors is None:
            note_frozen(model, peft_config, self.peft_config.values())
        self._plan = plan_wrappers(peft_config, model)
        self._readers = list(readers(model, self._plan))
        self._holders = _holders(model)
        found = candidate_tensors(self._plan, model, peft_config)
        refuse_offloaded(model, self._plan)
        refuse_wrapped_heads(model, peft_config)
        tell_of_quantized(model, found)
        tell_of_left_out(left_out(model))
        if peft_config.tensors is None:
            peft_config.selected = provisional_selection(model, peft_config, found)
            peft_config.tensors = dict.fromkeys(peft_config.selected)
            peft_config.loaded_again()  # whatever is loaded now is loaded over values
            peft_config.provisional = True
        names = {other: name for name, (_, tied) in found.items() for other in tied}
        for name, expected in peft_config.tensors.items():
            if name not in found:
                reason = f"is tied to {names[name]}" if name in names else "is not a candidate tensor of this model"
                if is_low_rank(name) and not peft_config.low_rank:
                    raise ValueError(
                        f"This delta changes {name}, and low_rank is False here: load it with the config that was saved with it."
                    )
                raise ValueError(f"This delta changes {name}, which {reason}. {ELSEWHERE}")
            peft_config.tensors[name] = fingerprint(*found[name])
            if expected is not None:
                check_fingerprint(name, expected, peft_config.tensors[name])
        if peft_config.selected is None:
            peft_config.selected = list(peft_config.tensors)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        if key in self._plan:
            return True
        matched = matches(peft_config, key)
        # peft wants to see its marker of an excluded module; a module that matches and owns no candidate is no target.
        return False if matched else matched

    # peft warns of tied embeddings, and where they are merged; here a tied tensor has one owner, and the others read
    # through it. `modules_to_save` does untie one.

    def _check_tied_modules(self, model: nn.Module, peft_config: GreenTrainerConfig) -> None:
        if peft_config.modules_to_save:
            super()._check_tied_modules(model, dataclasses.replace(peft_config, target_modules=None))

    def _check_merge_allowed(self) -> None:
        pass

    def _create_and_replace(
        self,
        peft_config: GreenTrainerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        own, tied = self._plan[current_key]
        if isinstance(target, GreenTrainerLayer):
            layer = target
            form = {"form": peft_config.form} if isinstance(layer, GreenTrainerLinear) else {}
            layer.add_adapter(adapter_name, **form)
        else:
            layer = wrap(target, adapter_name, peft_config.form)
            self._replace_module(parent, target_name, layer, target)
        for name, (owner, owned) in tied.items():
            layer.read_from(name, self.model.get_submodule(owner), owned)
        candidates = {form: base_name(f"{current_key}.{form}") for name in own for form in (name, low_rank_form(name))}
        for candidate in candidates.values():
            if candidate in peft_config.tensors:
                add_value(layer, adapter_name, candidate, peft_config.init_weights)
        trainable = adapter_name in self.active_adapters and not peft_config.inference_mode
        selected = {name for name, candidate in candidates.items() if candidate in peft_config.selected}
        layer.set_selected(adapter_name, selected, trainable, peft_config.provisional)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        for holder, name in self._holders[id(child)]:
            setattr(holder, name, new_module)
        self._holders[id(new_module)] = self._holders[id(child)]

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        """Merge, as peft does; with `safe_merge`, look at every layer before the first is written."""
        if safe_merge:
            self._refuse_broken(adapter_names)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
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
        base = super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)
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

    # What peft's saving and loading ask for

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return base_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        follow_layers(_base_of(model))
        warn_if_never_selected(model, adapter_name)
        # From peft's own copy, out of which it takes embeddings and modules_to_save afterwards.
        for key in [key for key in state_dict if key.endswith(f".{EXTRA_STATE}")]:
            del state_dict[key]
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        base = _base_of(model)
        prefix = PREFIX if isinstance(model, PeftModel) else ""
        in_file = set(candidates_in((key.removeprefix(prefix) for key in state_dict), layers(base).keys()))
        if in_file != set(config.tensors):  # a checkpoint of a run whose selection has changed since
            set_values(base, adapter_name, in_file)
            set_selection(base, adapter_name, in_file)
        elif config.loaded_again():
            let_all_require_grad(base, adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _viewed(get_embeddings: Callable[[], Optional[nn.Module]]) -> Optional[nn.Module]:
    embeddings = get_embeddings()
    return EmbeddingView(embeddings) if isinstance(embeddings, GreenTrainerLayer) else embeddings


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place in the model where a module is a child: a module object can have several parents."""
    holders = defaultdict(list)
    for parent in model.modules():
        for name, child in parent.named_children():
            holders[id(child)].append((parent, name))
    return holders
