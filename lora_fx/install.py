"""Putting adapters into a model, taking them out again, and what one does with them while they are there."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
from torch import nn

from lora_fx import _torch
from lora_fx.adapted import Adapted
from lora_fx.bypass import Patch, check_called, fast_path_patches
from lora_fx.config import ALL_LINEAR, CHANGES_BASE, LoRAConfig
from lora_fx.dora import with_magnitude
from lora_fx.experts import ExpertAdapter, LoRAExpertsModule, new_expert_adapter, swap_experts, unswap_experts
from lora_fx.first_factors import with_first_factors
from lora_fx.init_weights import patch_init_weights
from lora_fx.inits import check_bases
from lora_fx.linear import DEFAULT_NAME, LoRAModule, adapter_dtype
from lora_fx.merge_guard import unguard
from lora_fx.packed import is_activation_dtype
from lora_fx.placements import is_dtensor
from lora_fx.record import RECORD, Installation, check_kept
from lora_fx.refusals import check_experts, check_linear, check_model, check_name, check_room, shown
from lora_fx.swap import Adapter, new_adapter, swap, unswap
from lora_fx.targets import Target, by_module, clean_path, conv1d_hint, find_saved, find_targets
from lora_fx.trained import (
    check_originals,
    check_trainable,
    forget_originals,
    is_trained,
    keep_originals,
    restore_originals,
    trained_modules,
    with_originals,
)

Model = TypeVar("Model", bound=nn.Module)


def install(
    model: Model,
    config: LoRAConfig | None = None,
    *,
    adapter_name: str = DEFAULT_NAME,
    max_rank: int | None = None,
) -> Model:
    """Give every linear of `model` that `config` targets a low-rank adapter, in place, and freeze everything else.

    Each linear's class becomes ``LoRA<its class>``, with the parameters ``lora_a`` [R, K] and ``lora_b`` [N, R]; see
    `LoRAModule` (with `use_dora` ``DoRA<its class>``, see `DoRAModule`). Module structure, base parameters and their
    names stay as they are. The outputs stay too, until the first training step, because B starts at zero. Adapters take
    the device and dtype of the weight; beside a packed weight (integers, float8) they take the activation dtype: the
    bias's if it is floating point, or else the most frequent floating point dtype of 16 bits or more among the model's
    parameters, or else torch's default dtype.

    Of what `target_parameters` names each matrix gets an adapter; see `LoRAExpertsModule`.

    `nn.TransformerEncoderLayer`s that hold a target leave their inference fast path, which would go past the adapters.
    Two linears that share one weight get an adapter each; a linear that is registered under two names gets one. Where
    the model has an `init_weights`, the adapters start afresh whenever it is called.

    What `modules_to_save` names is trained whole, where it stands. A copy of what it held is kept beside it, for
    `remove` and `disabled`; of a model on the meta device, of what `init_weights` makes of it.

    With ``init="pissa"`` or ``"olora"`` a base weight W becomes the residual ``W - s B A``, and is kept on the CPU:
    `remove` gives it back to the bit. `state_dict` holds the residual, and is meant for a model that was installed
    likewise on the same base; `save_adapter` writes an adapter for W, of twice the rank. Outputs stay what they were,
    up to rounding; so they do with ``init="orthogonal"``.

    Install before `torch.compile`, and before FSDP or DDP wrap the model.

    Args:
        model: any module; a linear itself, too.
        config: `LoRAConfig()` when left out.
        adapter_name: for `lora_fx.set_adapter` and the like. Neither empty nor with a dot.
        max_rank: leave room for adapters of this rank on every adapted linear (`lora_fx.add_adapter`,
            `lora_fx.load_adapter`). Factors have this size then and are zero behind the adapter's own rank. Compiled
            code computes products of this size.

    Returns:
        `model`.

    Raises:
        TypeError: `model` or `config` is of the wrong type.
        ValueError: the configuration does not fit the model (see `LoRAConfig`), or an adapter could not work there. The
            text names the module and what to do. The model is then exactly as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    config = LoRAConfig() if config is None else config
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    check_name(adapter_name)
    check_model(model, RECORD)
    found = find_targets(model, config)
    check_room(found, config, max_rank)
    targets = [target for target in found if target.parameter is None]
    experts = by_module(target for target in found if target.parameter is not None)
    if config.target_modules == ALL_LINEAR and (hint := conv1d_hint(model)):
        warnings.warn(f"all-linear adapts {len(targets)} nn.Linear of {type(model).__name__}{hint}", stacklevel=2)
    for target in targets:
        check_linear(target.path, cast(nn.Linear, target.module), config)
    for group in experts:
        for target in group:
            check_experts(target, config)
    check_called(model, [(target.path, target.module, target.parameter or "weight") for target in found])
    saved = find_saved(model, config)
    check_trainable(model, saved)
    if config.init in CHANGES_BASE:
        bases = {target.path: (cast(nn.Linear, target.module), target.rank) for target in targets}
        check_bases(bases, config.init, model)

    # Tensors made in inference mode would never train. And what can fail comes before the first change.
    with torch.inference_mode(False):
        adapters = _new_adapters(model, targets, config, max_rank)
        expert_adapters = [[_new_expert_adapter(target, config) for target in group] for group in experts]
        record = Installation(
            config=config,
            paths=tuple(target.holder for target in found),
            requires_grad={clean_path(name): p.requires_grad for name, p in _named_parameters(model)},
            patches=fast_path_patches(model, [target.module for target in targets]),
        )
        setattr(model, RECORD, record)
        try:
            for target, adapter in zip(targets, adapters):
                swap(cast(nn.Linear, target.module), adapter, adapter_name)
            for group, several in zip(experts, expert_adapters):
                swap_experts(group[0].module, several, dropout=config.dropout, init=config.init, name=adapter_name)
            for module, patch in _patched(model, record):
                setattr(module, patch.name, patch.value)
            record.init_weights = patch_init_weights(model)
            keep_originals(module for module in saved if module._parameters or module._buffers)
            freeze(model)
        except BaseException:
            _undo(model, record)
            raise
    return model


def remove(model: Model) -> Model:
    """Take out what `install` put in: classes, parameters, buffers, `requires_grad` and `init_weights` as before.

    The base weights are what they were, and so is what `modules_to_save` trained: the model computes what it computed
    before it was installed on. A merged model (`lora_fx.merge`) stays merged and trained: it computes what it computed
    with adapters. A compiled model stays compiled and recompiles at its next call.

    Raises:
        ValueError: `install` was not called on `model`, a wrapper changed its modules since (FSDP, for instance), or
            what a trained module held is not known: it was on the meta device at install.
    """
    record = _record(model)
    merged = any(isinstance(module, Adapted) and module._lora_merged is not None for module in model.modules())
    check_not_in_rows(model)
    if not merged:
        check_originals(model, "lora_fx.remove")
    for path, module in model.named_modules():
        wrapper = _torch.data_parallel_wrapper(module)
        if wrapper is not None:
            raise ValueError(f"{shown(path)} is wrapped by {wrapper}: remove the adapters before wrapping")
        if isinstance(module, Adapted) and "_lora_parent" not in type(module).__dict__:
            raise ValueError(f"{shown(path)} became a {type(module).__name__} after install: undo that first")
    if not merged:
        restore_originals(module for _, module in trained_modules(model))
    unguard(model)
    _undo(model, record)
    return model


def freeze(model: Model) -> Model:
    """Make the adapters of `model`, and what `modules_to_save` names, the only parameters that require gradients.

    Repeat it whenever something thawed another one.

    Tensor parallelism's `SequenceParallel`, for one, replaces frozen parameters by trainable ones.

    Raises:
        ValueError: `model` holds no adapters, or they are merged.
    """
    check_not_merged(model)
    adapters = [parameter for _, parameter in named_adapter_parameters(model)]
    # By assignment: uninitialised parameters of lazy modules refuse `requires_grad_`.
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in adapters:
        parameter.requires_grad = True
    return model


def adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The parameters to give to an optimizer, in the order of `model.modules()`.

    They are A and B of every swapped linear and of experts, DoRA's magnitudes, and all parameters of what
    `modules_to_save` names.

    They stay the same objects when another adapter becomes active (`lora_fx.set_adapter`), so an optimizer goes on
    with the one that it was made for.

    Warns when a distributed parameter beside them requires gradients, see `thawed`.

    Args:
        model: holds adapters.
        adapter_name: of another adapter than the active one.

    Raises:
        ValueError: `model` holds no adapters, or none of that name.
    """
    adapters = [parameter for _, parameter in named_adapter_parameters(model, adapter_name)]
    if names := thawed(model):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"{names[0]}{more} require gradients beside the adapters. parallelize_module makes parameters anew and "
            f"does not always keep them frozen (SequenceParallel): call lora_fx.freeze(model) after it",
            stacklevel=2,
        )
    return adapters


def thawed(model: nn.Module) -> list[str]:
    """The distributed parameters of `model` that are no adapters and require gradients all the same.

    Plain ones are not named: nothing thaws those but the caller.
    """
    adapters = {id(parameter) for _, parameter in named_adapter_parameters(model)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and is_dtensor(parameter) and id(parameter) not in adapters
    ]


def named_adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> list[tuple[str, nn.Parameter]]:
    """As `adapter_parameters`, with the names that ``model.named_parameters()`` has for the active adapter's.

    Args:
        model: holds adapters.
        adapter_name: of another adapter than the active one.

    Raises:
        ValueError: `model` holds no adapters and trains no module, or has no adapter of that name.
    """
    if not any(is_trained(module) for module in model.modules()):
        adapted(model)
    found: dict[nn.Parameter, str] = {}  # a trained one may be shared
    for path, module in model.named_modules():
        parameters = dict(module._parameters) if is_trained(module) else {}
        if isinstance(module, Adapted):
            holder = module.holder(adapter_name)
            if holder is None:
                raise ValueError(f"{shown(path)} has no adapter called {adapter_name!r}")
            parameters = {name: holder._parameters[name] for name in module.lora_parameters}
        for name, parameter in parameters.items():
            if parameter is not None:
                found.setdefault(parameter, f"{path}.{name}".removeprefix("."))
    return [(name, parameter) for parameter, name in found.items()]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context `model` computes what it would without adapters, compiled or not, without recompiling.

    What `modules_to_save` trains is what it was at first. Contexts nest, and the state from before is restored however
    the block ends.

    Raises:
        ValueError: `model` holds no adapters, or they are merged; FSDP shards modules that are trained whole, or whose
            base weight `init` changed; or the first values of a trained module are not known.
    """
    check_not_merged(model)
    changed = [(p, m) for p, m in adapted(model) if isinstance(m, LoRAModule) and m._lora_base is not None]
    modules = [module for _, module in adapted(model) if module._lora_base is None]
    before = [module.lora_enabled for module in modules]
    try:
        with with_originals(model), with_first_factors(changed):
            for module in modules:
                module.lora_enabled = module.disabled_buffer()
            yield
    finally:
        for module, enabled in zip(modules, before):
            module.lora_enabled = enabled.to(module.lora_enabled.device)  # the model may have been moved in between


def is_installed(model: nn.Module) -> bool:
    """Whether `model` or a part of it holds adapters."""
    return any(isinstance(module, Adapted) for module in model.modules())


def configs(model: nn.Module) -> list[LoRAConfig]:
    """What was installed on `model` and on parts of it."""
    records = [module.__dict__.get(RECORD) for module in model.modules()]
    return [record.config for record in records if isinstance(record, Installation)]


def adapted(model: nn.Module) -> list[tuple[str, Adapted]]:
    """Path and module of every linear of `model` that holds an adapter, and of all adapted experts.

    Raises:
        ValueError: there is none, or one was lost (see `check_kept`).
    """
    check_kept(model)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Adapted)]
    if not found:
        raise ValueError(f"{type(model).__name__} holds no adapters: call lora_fx.install(model, config) first")
    return found


def check_not_disabled(model: nn.Module) -> None:
    """Raise ValueError where `disabled` shows first values in the place of those that were trained."""
    trained = bool(trained_modules(model))
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            off = trained and module.lora_enabled is module._lora_disabled
            if off or (module._lora_base is not None and module._lora_base.shown):
                raise ValueError(f"{shown(path)} is disabled: leave lora_fx.disabled first")


def check_not_merged(model: nn.Module) -> None:
    """Raise ValueError if an adapter of `model` is merged into its weight."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted) and module._lora_merged is not None:
            raise ValueError(f"{shown(path)} is merged: call lora_fx.unmerge(model) first")


def check_not_in_rows(model: nn.Module) -> None:
    """Raise ValueError within `lora_fx.adapters_per_row`, which holds copies of the adapters."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted) and module._lora_rows is not None:
            raise ValueError(f"{shown(path)} has adapters assigned to rows: leave lora_fx.adapters_per_row first")


def _record(model: nn.Module) -> Installation:
    record = model.__dict__.get(RECORD)
    if isinstance(record, Installation):
        return record
    for path, module in model.named_modules():
        if RECORD in module.__dict__:
            raise ValueError(f"adapters were installed on {shown(path)}, not on the module given: pass that one")
    raise ValueError("this module is not the one that lora_fx.install was called on")


def _undo(model: nn.Module, record: Installation) -> None:
    for module in list(model.modules()):
        if isinstance(module, LoRAModule):
            unswap(module)
        elif isinstance(module, LoRAExpertsModule):
            unswap_experts(module)
    forget_originals(module for _, module in trained_modules(model))
    for module, patch in _patched(model, record):
        setattr(module, patch.name, patch.previous)
    if record.init_weights is not None:
        record.init_weights.undo()
    for name, parameter in _named_parameters(model):
        parameter.requires_grad = record.requires_grad.get(clean_path(name), parameter.requires_grad)
    delattr(model, RECORD)


def _patched(model: nn.Module, record: Installation) -> list[tuple[nn.Module, Patch]]:
    """The patches with their modules, those left out that are gone: a pipeline stage drops other stages' layers."""
    modules = {clean_path(path): module for path, module in model.named_modules()}
    return [(modules[patch.path], patch) for patch in record.patches if patch.path in modules]


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


def _new_adapters(model: nn.Module, targets: list[Target], config: LoRAConfig, max_rank: int | None) -> list[Adapter]:
    dtypes = Counter(p.dtype for p in model.parameters() if is_activation_dtype(p.dtype))
    activation_dtype = dtypes.most_common(1)[0][0] if dtypes else torch.get_default_dtype()
    adapters = [
        new_adapter(
            cast(nn.Linear, target.module),
            rank=target.rank,
            scale=config.scale(target.rank, target.alpha),
            dropout=config.dropout,
            init=config.init,
            dtype=adapter_dtype(cast(nn.Linear, target.module), activation_dtype),
            room=target.rank if max_rank is None else max_rank,
        )
        for target in targets
    ]
    if not config.use_dora:
        return adapters
    return [with_magnitude(cast(nn.Linear, target.module), adapter) for target, adapter in zip(targets, adapters)]


def _new_expert_adapter(target: Target, config: LoRAConfig) -> ExpertAdapter:
    return new_expert_adapter(
        target.module,
        cast(str, target.parameter),
        rank=target.rank,
        scale=config.scale(target.rank, target.alpha),
        init=config.init,
    )
