"""Adapters as files that PEFT reads and writes. See `lora_fx.peft_files` for the format."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lora_fx import _torch
from lora_fx.adapters import adapter_names, check_known, check_new_name, exchangeable
from lora_fx.branches import branches
from lora_fx.config import ALL_LINEAR, LoRAConfig
from lora_fx.distributed import largest_mesh, together, writes
from lora_fx.dora import DoRAModule
from lora_fx.entries import Entry, fill_adapter, store_adapter, widen
from lora_fx.files import write_together
from lora_fx.install import check_not_disabled, check_not_in_rows, check_not_merged, install, is_installed, remove
from lora_fx.linear import DEFAULT_NAME
from lora_fx.peft_experts import match_experts
from lora_fx.peft_files import PREFIX, AdapterFiles, Factors, check_rank, encoded, read_files
from lora_fx.record import check_kept
from lora_fx.saved import checked_adapter, gathered_factor, in_files, plain_adapter, written_config
from lora_fx.targets import clean_path, conv1d_hint, exactly
from lora_fx.trained_state import (
    TrainedEntry,
    check_same_trained,
    check_trained,
    fill_trained,
    gathered_trained,
    match_trained,
)

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], *, adapter_name: str | None = None) -> Path:
    """Write the adapter of `model` into `folder`, as PEFT's `adapter_model.safetensors` and `adapter_config.json`.

    PEFT computes from them what `model` computes: the scales that are written are those of the buffers `lora_scale`,
    whatever `model` was installed with. Paths are written without what activation checkpointing, FSDP, DDP and
    ``torch.compile(model)`` put into them. Factors keep their dtype, and are cut to the adapter's rank where they have
    room for more (unless something was written there). Of linears whose base an initialisation changed (PiSSA, OLoRA)
    it is an ordinary adapter of twice the rank, for the base as it was. What else `folder` holds stays there.

    A kill at any moment leaves the adapter that was there before or the new one. Nothing is pickled.

    On several ranks: distributed factors are gathered, so all ranks of their mesh call this together, and its first
    one writes; it is on disk when any returns. With plain factors, whoever calls this writes. Pipeline stages hold
    different adapters: give each a folder of its own.

    Args:
        model: holds adapters.
        folder: made if it is not there.
        adapter_name: which of several; the active one when left out.

    Returns:
        `folder`.

    Raises:
        ValueError: `model` holds no adapters, lost some since `install`, or some cannot be written (not finite, on the
            meta device, flat shards of FSDP1); the text names the module. What was in `folder` is still there.
        OSError: writing failed; what was in `folder` is still there.
        RuntimeError: another rank raised.
    """
    where, model = Path(folder), _unwrapped(model)
    check_kept(model)
    check_not_merged(model)
    check_not_disabled(model)
    _torch.reshard(model)
    found = {branch.path: branch for branch in branches(model)}
    if not found:
        raise ValueError(f"{type(model).__name__} holds no adapters to save: call lora_fx.install(model, config) first")
    if adapter_name is not None:
        check_known(model, adapter_name)
    mesh = largest_mesh(model)
    holders = {path: branch.holder(adapter_name) for path, branch in found.items()}
    whole = {
        path: {key: gathered_factor(holders[path]._parameters[name]) for key, name in branch.keys.items()}
        for path, branch in found.items()
    }
    trained = gathered_trained(model)
    with together(mesh):
        plain = {
            path: plain_adapter(branch, holders[path], checked_adapter(branch, holders[path], whole[path]))
            for path, branch in found.items()
        }
        plain = {path: saved for path, saved in plain.items() if saved[0].rank}
        if not plain:
            raise ValueError(f"the adapter has rank 0 in all of {', '.join(holders)}: there is nothing to save")
        parameters = [path for path, branch in found.items() if branch.parameter is not None]
        config = written_config(model, holders, plain, check_trained(model, trained), parameters)
        if writes(mesh):
            factors = {path: factors for path, (factors, _) in plain.items()}
            write_together(where, encoded(in_files(found, factors), trained, config))
    return where


def load_adapter(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    max_rank: int | None = None,
) -> Model:
    """Load an adapter that `save_adapter` or PEFT wrote into `model`, in place.

    A model without adapters gets those of the files (`lora_fx.install`), with the dropout of the configuration, and
    with factors in the file's dtype or the one that `install` gives, whichever is wider.

    A model that holds adapters must have room: an adapter on each linear that the files name, of their rank or more. It
    must train the same modules whole (`modules_to_save`). The adapter that is named, or else the active one, gets the
    files' values, in the dtype of its own factors, and their scales; its dropout stays. What the files do not fill
    becomes zero: the rest of larger factors, and adapters on linears that the files do not name. No tensor changes its
    identity then: compiled code and optimizers go on with the new values, and nothing recompiles. A name that the model
    does not know is a new adapter beside the others, as if `lora_fx.add_adapter` had made it; `lora_fx.set_adapter`
    makes it active.

    On several ranks all ranks of the model's mesh call this together, and every one reads the files.

    Args:
        model: any model whose linears have the paths that the files name.
        folder: where the files are; of an adapter that is not called ``default``, PEFT's folder of that name.
        adapter_name: what the adapter is called in the model; where the model has none yet, ``default`` if left out.
        max_rank: as for `lora_fx.install`, where the model has no adapters yet.

    Returns:
        `model`.

    Raises:
        ValueError: a file is missing, damaged or of another kind of adapter, the files contradict one another, or they
            do not fit the model (see also `lora_fx.install`). The text names the file or the module, and what to do;
            the model is then exactly as it was.
        RuntimeError: another rank raised; the model is as it was on all of them.
    """
    inner = _unwrapped(model)
    check_not_merged(inner)
    check_not_disabled(inner)
    check_not_in_rows(inner)
    _torch.reshard(inner)
    mesh = largest_mesh(inner)
    installed = is_installed(inner)
    if installed and max_rank is not None:
        raise ValueError("max_rank is for a model without adapters: these factors have their size already")
    new = installed and adapter_name is not None and adapter_name not in adapter_names(inner)
    if new:
        assert adapter_name is not None
        exchangeable(inner)
        check_new_name(inner, adapter_name)
    with torch.inference_mode(False):  # whose tensors would never train
        with together(mesh):
            files = read_files(Path(folder))
            found, trained = _matched(inner, files), match_trained(inner, files)
            _check_storage([*found, *trained])
            if installed:
                if not new and adapter_name is not None:
                    check_known(inner, adapter_name)
                values = _fitting(inner, found, files)
                check_same_trained(inner, trained, files, _FRESH)
        if not installed:
            _install_files(inner, found, trained, files, mesh, adapter_name or DEFAULT_NAME, max_rank)
        elif new:
            store_adapter(inner, found, values, adapter_name or DEFAULT_NAME, files.config.dropout)
        else:
            fill_adapter(inner, found, values, adapter_name)
        fill_trained(trained)
    return model


# ---- loading ---------------------------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that DDP or `nn.DataParallel` wraps, whose paths do not start with ``module.``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if _torch.data_parallel_wrapper(model) in ("DistributedDataParallel", "DataParallel"):
        inner: Any = model.module
        assert isinstance(inner, nn.Module)
        return inner
    return model


def _matched(model: nn.Module, files: AdapterFiles) -> list[Entry]:
    """The entries of the files with what they are for, which must be what the configuration names."""
    modules = {clean_path(path): module for path, module in model.named_modules(remove_duplicate=False)}
    first: dict[nn.Module, str] = {}
    for path, module in modules.items():
        first.setdefault(module, path)
    linears = {path: module for module, path in first.items() if isinstance(module, nn.Linear)}
    entries: dict[str, Entry] = {}
    config = files.config
    experts, used = match_experts(modules, files)
    for path, factors in files.factors.items():
        if path in used:
            continue
        linear = _linear(modules, list(linears), path, files)
        shape = [linear.out_features, linear.in_features]
        if [factors.lora_b.shape[0], factors.lora_a.shape[1]] != shape:
            raise ValueError(
                f"{path} is {shape} in the model, and {files.tensors} has lora_A {list(factors.lora_a.shape)} and "
                f"lora_B {list(factors.lora_b.shape)} for it: load the adapter into the model it was trained on"
            )
        if first[linear] in entries:
            raise ValueError(f"{files.tensors} has {entries[first[linear]].path} and {path}, which are one module here")
        check_rank(config, files.tensors, path, factors.rank)
        entries[first[linear]] = Entry(path, linear, factors, config.alpha_of(path), config.scale_of(path))
    targeted = {path for path in linears if files.config.targets(path)}
    if files.config.target_modules == ALL_LINEAR:  # of which PEFT excepts the head, but only in transformers' models
        targeted -= {path for path in _heads(model, first) if path not in entries}
    for path in linears:
        if path in targeted and path not in entries:
            raise ValueError(
                f"{files.tensors} lacks {PREFIX}{path}.lora_A.weight and lora_B.weight, and target_modules in "
                f"{files.config.file} names that module: save the adapter again, or name full paths"
            )
        if path in entries and not any(files.config.targets(name, hidden=True) for name in (path, entries[path].path)):
            raise ValueError(
                f"{files.tensors} has tensors for {path}, which target_modules in {files.config.file} does not name: "
                f"the two files are not of one adapter; PEFT would ignore these tensors"
            )
    return [
        *entries.values(),
        *(
            Entry(e.path, e.module, e.factors, config.alpha_of(e.path), config.scale_of(e.path), e.parameter)
            for e in experts
        ),
    ]


def _linear(modules: dict[str, nn.Module], linears: list[str], path: str, files: AdapterFiles) -> nn.Linear:
    module = modules.get(path)
    if isinstance(module, nn.Linear):
        return module
    if module is not None:
        raise ValueError(
            f"{files.tensors}: {path} is a {type(module).__name__} and no nn.Linear: only linears can be adapted here"
            f"{conv1d_hint(module)}"
        )
    same_end = [known for known in linears if path.endswith("." + known) or known.endswith("." + path)]
    near = same_end or difflib.get_close_matches(path, linears, n=3)
    hint = f" (the nearest: {', '.join(near[:3])})" if near else ""
    raise ValueError(
        f"{files.tensors}: the model has no module {path}{hint}: load the adapter into the model it was trained on, "
        f"and not into a part of it or a module around it"
    )


def _heads(model: nn.Module, first: dict[nn.Module, str]) -> list[str]:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return [first[head]] if isinstance(head, nn.Module) and head in first else []


def _check_storage(found: Iterable[Entry | TrainedEntry]) -> None:
    for entry in found:
        if any(parameter.is_meta for parameter in entry.module.parameters(recurse=False)):
            raise ValueError(
                f"{entry.path} is on the meta device, where there is nothing to write into: give the model storage "
                f"and weights first (to_empty)"
            )


_FRESH = "call lora_fx.remove(model) first, and load_adapter installs what the files hold"


def _fitting(model: nn.Module, found: list[Entry], files: AdapterFiles) -> list[Factors]:
    """The factors of the files in the dtypes of those that `model` holds, which must have room for them."""
    known = {(branch.module, branch.parameter) for branch in branches(model)}
    values = []
    for entry in found:
        if (entry.module, entry.parameter) not in known:
            raise ValueError(
                f"{files.tensors} has an adapter for {entry.path}, and the model has none there: {_FRESH}, or install "
                f"on the linears of all adapters"
            )
        module, (lora_a, lora_b) = entry.branch.module, entry.branch.factors
        if lora_b.ndim != entry.factors.lora_b.ndim:
            raise ValueError(
                f"{entry.path} is a flat shard of FullyShardedDataParallel: load within "
                f"FullyShardedDataParallel.summon_full_params(model)"
            )
        if module._lora_base is not None:
            raise ValueError(
                f"{entry.path} holds the residual that init={module.lora_init!r} left of its weight, and "
                f"{files.tensors} is for the weight as it was: {_FRESH}"
            )
        if entry.parameter is not None and lora_b.shape[-1] != entry.factors.rank:
            raise ValueError(
                f"{entry.path} has rank {lora_b.shape[-1]} in the model and rank {entry.factors.rank} in "
                f"{files.tensors}: {_FRESH}"
            )
        if (room := lora_b.shape[-1]) < entry.factors.rank:
            raise ValueError(
                f"{entry.path} has room for rank {room} in the model and rank {entry.factors.rank} in "
                f"{files.tensors}: {_FRESH}; lora_fx.install(model, config, max_rank=...) leaves room for several"
            )
        if entry.parameter is None and isinstance(module, DoRAModule) != files.config.use_dora:
            raise ValueError(
                f"{entry.path} is a {type(entry.module).__name__}, and use_dora in {files.config.file} is "
                f"{files.config.use_dora}: {_FRESH}"
            )
        values.append(_converted(entry, lora_a.dtype, files))
    return values


def _converted(entry: Entry, dtype: torch.dtype, files: AdapterFiles) -> Factors:
    held = {name: tensor.to(dtype) for name, tensor in entry.factors.named().items()}
    if not all(torch.isfinite(tensor).all() for tensor in held.values()):
        raise ValueError(f"{entry.path}: values of {files.tensors} are too large for {dtype}: use a wider dtype")
    return Factors(**held)


def _install_files(
    model: nn.Module,
    found: list[Entry],
    trained: list[TrainedEntry],
    files: AdapterFiles,
    mesh: Any,
    name: str,
    max_rank: int | None,
) -> None:
    install(model, _lora_config(found, trained, files), adapter_name=name, max_rank=max_rank)
    try:
        with together(mesh):
            values = [_converted(entry, _wider(entry), files) for entry in found]
        for entry, factors in zip(found, values):
            widen(entry.branch, factors.lora_a.dtype)
        fill_adapter(model, found, values, name)
    except BaseException:
        remove(model)
        raise


def _wider(entry: Entry) -> torch.dtype:
    dtype: torch.dtype = entry.branch.factors[0].dtype
    for tensor in entry.factors.named().values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _lora_config(found: list[Entry], trained: list[TrainedEntry], files: AdapterFiles) -> LoRAConfig:
    """The configuration that installs the adapters of the files: exact paths, one expression for each number."""
    linears = [entry.path for entry in found if entry.parameter is None]
    parameters = [entry.path for entry in found if entry.parameter is not None]
    ranks: dict[int, list[str]] = {}
    alphas: dict[float, list[str]] = {}
    for entry in found:
        ranks.setdefault(entry.factors.rank, []).append(entry.path)
        if entry.alpha >= torch.finfo(torch.float32).tiny:  # others `LoRAConfig` refuses; scales are set all the same
            alphas.setdefault(entry.alpha, []).append(entry.path)
    rank = max(ranks, key=lambda value: len(ranks[value]))
    alpha = max(alphas, key=lambda value: len(alphas[value]), default=LoRAConfig.alpha)
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=files.config.dropout,
        target_modules=exactly(linears) if linears else (),
        target_parameters=exactly(parameters) if parameters else (),
        modules_to_save=exactly(sorted({entry.path for entry in trained})) if trained else (),
        rank_pattern={exactly(paths): value for value, paths in ranks.items() if value != rank},
        alpha_pattern={exactly(paths): value for value, paths in alphas.items() if value != alpha},
        use_rslora=files.config.use_rslora,
        use_dora=files.config.use_dora,
        init=files.config.init,
    )
