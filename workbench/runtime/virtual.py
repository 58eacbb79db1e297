"""The virtualized module: many adapted views of one set of base weights.

A view is a copy of the module tree over the same parameter storage: its own modules, Parameter objects, buffers, hooks and config.
What PEFT injects into a view, the base and the other views never see. Shared weights cannot be moved, cast, trained or written
through a view. The idea is Loquetier's (arXiv 2511.00101, "Virtualized Module").
"""

import copy
import gc
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.config import did_you_mean, require
from workbench.runtime.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterWeights,
    inside,
    peft_config,
    peft_tensors,
    read_config,
    read_tensors,
)

FILE_PREFIX = "base_model.model."  # PEFT's prefix of tensor names in a saved adapter
_VIEWS: "WeakKeyDictionary[nn.Module, WeakSet[nn.Module]]" = WeakKeyDictionary()
_ALL_VIEWS: "WeakSet[nn.Module]" = WeakSet()


class SharedWeightsError(RuntimeError):
    """Something tried to move, cast, train or write weights that others share."""


WRITE_ADVICE = (
    "shared base weights cannot be written through a view (merging, PiSSA-like initialisation, loading or in-place changes would reach "
    "every other view). Do it on a model of its own: copy.deepcopy(view), or load_base(path)."
)
TRAIN_ADVICE = (
    "shared base weights cannot be trained through a view, got requires_grad=True. Train an adapter (bias='none'), "
    "or a model of its own: copy.deepcopy(view)."
)
MOVE_ADVICE = (
    "shared base weights cannot be moved or cast through a view. Load the base where and as it is needed "
    "(load_base(path, device=, dtype=)) and make the view of that, or move a model of its own: copy.deepcopy(view)."
)
RESIZE_ADVICE = (
    "shared embeddings cannot be resized through a view. Resize a model of its own (copy.deepcopy(view)), or the base before it has views."
)


class _Shared(Tensor):
    """A tensor over shared storage that refuses to be written by any in-place method."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class SharedParameter(nn.Parameter):
    """A view's parameter: the base's storage, never trained, moved or written. A deep copy is an ordinary parameter."""

    @classmethod
    def over(cls, tensor: Tensor) -> "SharedParameter":
        return torch.Tensor._make_subclass(cls, tensor.detach(), False)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return torch.Tensor._make_subclass(_Shared, self.detach(), False)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is not self:  # a move that changes nothing assigns the parameter to itself
            raise SharedWeightsError(WRITE_ADVICE)

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> "SharedParameter":
        if requires_grad:
            raise SharedWeightsError(TRAIN_ADVICE)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), requires_grad=False)
        return memo[id(self)]

    def __reduce_ex__(self, proto: Any) -> Any:
        return nn.Parameter(self.detach(), requires_grad=False).__reduce_ex__(proto)


def _refuse_write(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise SharedWeightsError(WRITE_ADVICE)


_IN_PLACE = [n for n in dir(Tensor) if n.endswith("_") and not n.startswith("_") and n != "requires_grad_"]
_IN_PLACE += [n for n in dir(Tensor) if n.startswith("__i") and hasattr(Tensor, f"__{n[3:]}")] + ["__setitem__"]
for _class in (_Shared, SharedParameter):
    for _name in _IN_PLACE:
        setattr(_class, _name, _refuse_write)


class _Bound:
    """A function bound to one module; a deep copy of the module gets the module's ordinary method instead.

    `keep=False` binds weakly, so that a guard does not keep a base alive in a cycle; `keep=True` lets `VirtualModule(base).attach(c)` work.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any], *, keep: bool = False) -> None:
        self._module: Callable[[], Any] = (lambda: module) if keep else ref(module)
        self._name, self._function = name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._module(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        module = self._module()
        ordinary = getattr(type(module), self._name, self._function)
        return types.MethodType(ordinary, memo[id(module)])

    def __reduce__(self) -> Any:
        raise TypeError("a view is not pickled (it would take the whole base along). Carry its adapter instead: carried = view.detach().")


def _guard_moves(module: nn.Module, advice: str) -> None:
    """`.to()`, `.half()`, `.cuda()` and their like on `module` raise, unless they would change nothing."""

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        guarded = [m for m in (self.modules() if recurse else [self]) if isinstance(m.__dict__.get("_apply"), _Bound)]
        shared = [t for m in guarded for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        if any(_would_change(t, fn) for t in shared):
            raise SharedWeightsError(advice)
        return type(self)._apply(self, fn, recurse)

    module.__dict__["_apply"] = _Bound(module, "_apply", apply)


def _would_change(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> bool:
    probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    try:
        return fn(probe) is not probe
    except Exception:  # e.g. a device that is not there: whatever it is, it is not "nothing changes"
        return True


def pin(base: nn.Module, advice: str) -> Callable[[], None]:
    """Moving or casting `base` or a part of it raises `SharedWeightsError(advice)` from now on; call the result to allow it again."""
    modules = [m for m in base.modules() if "_apply" not in m.__dict__]
    for module in modules:
        _guard_moves(module, advice)

    def release() -> None:
        for module in modules:
            module.__dict__.pop("_apply", None)

    return release


def _guard_writes(module: nn.Module) -> None:
    def load(self: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in (*self._parameters, *self._buffers):
            if prefix + name in state_dict:
                raise SharedWeightsError(f"{prefix + name}: {WRITE_ADVICE}")
        type(self)._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]

    def resize(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise SharedWeightsError(RESIZE_ADVICE)

    module.__dict__["_load_from_state_dict"] = _Bound(module, "_load_from_state_dict", load)
    if hasattr(type(module), "resize_token_embeddings"):
        module.__dict__["resize_token_embeddings"] = _Bound(module, "resize_token_embeddings", resize)


class _IsView(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, nn.Module) and instance in _ALL_VIEWS


class VirtualModule(metaclass=_IsView):
    """`VirtualModule(base)` is a view of `base`: a module of the base's own class over the same weights, for PEFT to adapt.

    `peft.get_peft_model(view, LoraConfig(...))` works as on the base. A view has two methods more than the base:
    `view.detach(name=None) -> CarriedAdapter` takes an adapter off, `view.attach(carried)` puts one on. `isinstance(view, VirtualModule)`
    tells views apart. Raises ValueError for a base that has adapters in it, is a view, or has an instance-level `forward`.
    """

    def __new__(cls, base: nn.Module) -> Any:
        _check_base(base)
        # A deep copy in which every parameter is already "copied": ties stay ties, config and hooks become the view's own.
        memo: dict[int, Any] = {id(p): SharedParameter.over(p) for p in base.parameters()}
        view = copy.deepcopy(base, memo)
        for module in view.modules():
            _guard_moves(module, MOVE_ADVICE)
            _guard_writes(module)
        view.__dict__["detach"] = _Bound(view, "detach", detach_adapter, keep=True)
        view.__dict__["attach"] = _Bound(view, "attach", attach_adapter, keep=True)
        _VIEWS.setdefault(base, WeakSet()).add(view)
        _ALL_VIEWS.add(view)
        return view

    @classmethod
    def with_adapter(cls, base: nn.Module, weights: AdapterWeights) -> Any:
        """A view of `base` with these weights on it, in their own dtype: as PEFT computes with them."""
        view: Any = cls(base)
        return view.attach(CarriedAdapter.of(weights))


def has_views(base: nn.Module) -> bool:
    """Whether views of `base` are alive."""
    if _VIEWS.get(base):
        gc.collect()  # a view refers to itself
    return bool(_VIEWS.get(base))


def _check_base(base: nn.Module) -> None:
    if isinstance(base, VirtualModule):
        raise ValueError("base must not be a view itself. Make every view of the base: VirtualModule(base).")
    if isinstance(base, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in base.modules()):
        raise ValueError("base must have no adapters in it. Load the base again, and inject the adapters into VirtualModule(base).")
    for name, module in base.named_modules():
        if "forward" in module.__dict__:
            raise ValueError(
                f"{name or type(base).__name__} must not have a forward of its own instance (a view's adapters would be ignored). "
                "Remove what replaced it (e.g. accelerate's hooks), then make the view."
            )


@dataclass(frozen=True, eq=False)
class CarriedAdapter:
    """An adapter off its module: PEFT's configuration and the adapter's own weights (CPU, as they were), nothing of the base.

    `tensors` maps `<path of the linear>.lora_A.weight` and so on to values; `trainable` names those that were being trained. Goes
    through pickle, or through `save` and `load` as an ordinary PEFT directory.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    trainable: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def of(cls, weights: AdapterWeights) -> "CarriedAdapter":
        """The same adapter as loaded for an engine."""
        # Copies: pickle would write the whole buffer behind every view of it.
        tensors = {key.removeprefix(FILE_PREFIX): tensor.clone() for key, tensor in peft_tensors(weights).items()}
        return cls(weights.name, peft_config(weights), tensors)

    def save(self, directory: str | Path) -> Path:
        """Write an ordinary PEFT directory."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        flat = {FILE_PREFIX + _file_key(key): tensor.contiguous() for key, tensor in self.tensors.items()}
        save_file(flat, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(dict(self.config) | {"inference_mode": not self.trainable}, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, directory: str | Path, name: str = "default") -> "CarriedAdapter":
        """Read a PEFT directory (safetensors only). Raises FileNotFoundError or ValueError as `load_peft` does."""
        folder = Path(directory)
        config = read_config(inside(folder, CONFIG_FILE))
        flat = read_tensors(inside(folder, WEIGHTS_FILE))
        tensors = {_module_key(key.removeprefix(FILE_PREFIX)): tensor for key, tensor in flat.items()}
        trainable = frozenset() if config.get("inference_mode", True) else frozenset(tensors)
        return cls(name, config, tensors, trainable)


# PEFT saves DoRA's magnitude without its module's ".weight".
_MAGNITUDE = ".lora_magnitude_vector"


def _file_key(key: str) -> str:
    return key.removesuffix(".weight") if key.endswith(f"{_MAGNITUDE}.weight") else key


def _module_key(key: str) -> str:
    return f"{key}.weight" if key.endswith(_MAGNITUDE) else key


def detach_adapter(model: nn.Module, name: str | None = None) -> CarriedAdapter:
    """Take an adapter off `model` (a view, or any module that PEFT adapted) and return it; without a name, the only one.

    The module is then as it was before the injection. Raises ValueError for an unknown or ambiguous name, or an adapter with
    modules_to_save (copies of base modules are not carried).
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if name is None:
        require(len(configs) == 1, "the adapter must be named unless there is exactly one", sorted(configs), "Pass its name.")
        (name,) = configs
    if name not in configs:
        raise ValueError(f"adapter must be one of this module's, got {name!r}. {did_you_mean(name, list(configs))}")
    if any(isinstance(m, AuxiliaryTrainingWrapper) for m in model.modules()):
        raise ValueError(
            "an adapter must consist of adapter layers to be carried, got modules_to_save or trained token embeddings. "
            "Save it with PEFT's save_pretrained."
        )
    config = _plain_config(configs[name])
    tensors, trainable = {}, set()
    for path, layer in _adapted(model):
        for key, parameter in _own_parameters(layer, name).items():
            tensors[f"{path}.{key}"] = parameter.detach().to("cpu", copy=True)
            if parameter.requires_grad:
                trainable.add(f"{path}.{key}")
    _remove(model, name)
    return CarriedAdapter(name, config, tensors, frozenset(trainable))


def attach_adapter(model: nn.Module, carried: CarriedAdapter) -> nn.Module:
    """Put a carried adapter on `model` and return it; outputs are bit-equal to those before it was taken off.

    Weights go to the device of the layers that they adapt and keep their dtype. Raises ValueError, leaving the module as it was, for
    a module that has an adapter already, or an adapter made for another base.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"a view must carry one adapter at a time, got {sorted(model.peft_config)} on it. "  # type: ignore[arg-type]
            "Detach it first, or make another VirtualModule(base): views share their weights."
        )
    config_type = PEFT_TYPE_TO_CONFIG_MAPPING[carried.config["peft_type"]]
    config = config_type(**copy.deepcopy(dict(carried.config)))
    try:
        # On the meta device: every adapter weight is put in place below.
        inject_adapter_in_model(config, model, adapter_name=carried.name, low_cpu_mem_usage=True)
        _fill(model, carried)
    except ValueError:
        _remove(model, carried.name)
        raise
    return model


def _fill(model: nn.Module, carried: CarriedAdapter) -> None:
    left = dict(carried.tensors)
    for path, layer in _adapted(model):
        base_layer = layer.get_base_layer()
        device = next(base_layer.parameters()).device
        for key, parameter in _own_parameters(layer, carried.name).items():
            full = f"{path}.{key}"
            found = left.pop(full, None)
            if found is None or found.shape != parameter.shape:
                got = "nothing" if found is None else tuple(found.shape)
                raise ValueError(f"{full} must have shape {tuple(parameter.shape)}, got {got}. Attach it to the base that it was made for.")
            parent, last = _parent(layer, _with_name(key, carried.name))
            value = nn.Parameter(found.to(device, copy=True), requires_grad=full in carried.trainable)
            parent._parameters[last] = value
        layer.train(base_layer.training)
    if left:
        raise ValueError(f"{min(left)} has no place in this base. Attach the adapter to the base that it was made for.")


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _own_parameters(layer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters in one layer, keyed without the adapter's name: `lora_A.weight`."""
    found = {}
    for key, parameter in layer.named_parameters():
        parts = key.split(".")
        if parts[0] != "base_layer" and len(parts) > 1 and parts[1] == name:
            found[".".join([parts[0], *parts[2:]])] = parameter
    return found


def _with_name(key: str, name: str) -> str:
    first, *rest = key.split(".")
    return ".".join([first, name, *rest])


def _parent(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the last name of a dotted path, and that name."""
    head, _, last = path.rpartition(".")
    return module.get_submodule(head), last


def _remove(model: nn.Module, name: str) -> None:
    """Remove the adapter, and the layers that have no adapter left."""
    for path, layer in _adapted(model):
        layer.delete_adapter(name)
        if not layer._all_available_adapter_names():
            parent, last = _parent(model, path)
            setattr(parent, last, layer.get_base_layer())
    configs: Any = getattr(model, "peft_config", None)
    if configs is not None:
        configs.pop(name, None)
        if not configs:
            del model.peft_config


def _plain_config(config: Any) -> dict[str, Any]:
    """PEFT's configuration as JSON would hold it. Run-time options stay behind, as in PEFT's own files."""
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items() if k != "runtime_config"}
    return json.loads(json.dumps(values, default=str))
