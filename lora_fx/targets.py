"""Which linears and stacks of experts a configuration adapts, with which rank and alpha. Changes nothing."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from lora_fx.config import ALL_LINEAR, LoRAConfig, matches

# Path segments that a wrapper puts between a module and its parent, and that no user means to write.
WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")

Number = TypeVar("Number", int, float)

_RULE = "A name matches whole path segments from the end, and 're:...' the full path."


@dataclass(frozen=True)
class Target:
    """A linear to adapt, or a parameter of `module`; `path` is its first path in the model."""

    path: str
    module: nn.Module
    rank: int
    alpha: float
    parameter: str | None = None


@dataclass(frozen=True)
class _Linear:
    """A linear (or a parameter) and every path that leads to it: one module may be registered in several places."""

    module: nn.Module
    paths: tuple[str, ...]
    parameter: str | None = None


@dataclass(frozen=True)
class _Paths:
    """All paths of a model, those of its linears and of its stacks of matrices apart."""

    linears: tuple[_Linear, ...]
    others: Mapping[str, nn.Module]
    stacks: tuple[_Linear, ...]


def find_targets(model: nn.Module, config: LoRAConfig) -> list[Target]:
    """What `config` adapts of `model`: linears, then parameters, each in the order of ``model.named_modules()``.

    The path of a model that is a linear itself is the empty string: ``"all-linear"`` and regular expressions reach it.

    Raises:
        ValueError: a pattern of the configuration matches nothing, or only what it cannot be for (the message
            lists near misses); nothing is left to adapt; one module is known by several names that disagree; two
            entries of `rank_pattern` or `alpha_pattern` give one module different numbers; a pattern of
            `target_modules` names only what `modules_to_save` trains whole.
    """
    paths = _paths(model)
    if not paths.linears and not config.target_parameters:
        raise ValueError(f"{type(model).__name__} holds no nn.Linear: there is nothing to adapt{conv1d_hint(model)}")
    targeted = _targeted(config.target_modules, paths) + _targeted_stacks(config.target_parameters, paths, model)
    kept = _without_excluded(targeted, config.exclude_modules, paths)
    if not kept:
        raise ValueError("exclude_modules leaves no linear to adapt")
    kept = _without_saved(kept, find_saved(model, config), config)
    ranks = _numbers("rank_pattern", config.rank_pattern, kept, paths)
    alphas = _numbers("alpha_pattern", config.alpha_pattern, kept, paths)
    return [
        Target(path, found.module, ranks.get(path, config.rank), alphas.get(path, config.alpha), found.parameter)
        for found in kept
        for path in found.paths[:1]
    ]


def find_saved(model: nn.Module, config: LoRAConfig) -> dict[nn.Module, str]:
    """The modules that `modules_to_save` names and all modules below them, with their first paths.

    Raises:
        ValueError: a pattern matches no module, or only modules that hold no parameter.
    """
    patterns = config.modules_to_save
    assert isinstance(patterns, tuple)
    modules = [(clean_path(path), module) for path, module in model.named_modules(remove_duplicate=False)]
    found: dict[nn.Module, str] = {}
    for pattern in patterns:
        hits = [(path, module) for path, module in modules if matches(pattern, path)]
        if not hits:
            near = _near_misses(pattern, [path for path, _ in modules], "modules")
            raise ValueError(f"modules_to_save: {pattern!r} matches no module. {_RULE} {near}")
        if all(next(module.parameters(), None) is None for _, module in hits):
            kind = type(hits[0][1]).__name__
            raise ValueError(f"modules_to_save: {pattern!r} matches nothing with parameters ({hits[0][0]}: {kind})")
        for path, module in hits:
            for below, child in module.named_modules():
                found.setdefault(child, clean_path(f"{path}.{below}".strip(".")))
    return found


def clean_path(path: str) -> str:
    """`path` without the segments that wrappers add: activation checkpointing, FSDP, `torch.compile(model)`."""
    return ".".join(segment for segment in path.split(".") if segment not in WRAPPER_SEGMENTS)


def conv1d_hint(model: nn.Module) -> str:
    """What to do about the `Conv1D`s of `model`, transformers' linears that are no `nn.Linear`; empty without any."""
    # By name, because transformers is no dependency.
    found = [path for path, module in model.named_modules() if _is_conv1d(module)]
    if not found:
        return ""
    where = f" ({len(found)} here: {found[0]}, ...)" if found[0] else ""
    return (
        f". A Conv1D is a linear of transformers whose class is no nn.Linear{where}: to adapt them, use "
        f"lora_fx.convert(model, [lora_fx.Conv1DConverter(), lora_fx.LoRAConverter(config)])"
    )


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def exactly(paths: Sequence[str]) -> str:
    """A pattern that matches these full paths and no others."""
    return f"re:{'|'.join(map(re.escape, paths))}"


def _paths(model: nn.Module) -> _Paths:
    linears: dict[nn.Linear, list[str]] = {}
    others: dict[str, nn.Module] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        path = clean_path(raw)
        if isinstance(module, nn.Linear):
            linears.setdefault(module, []).append(path)
        else:
            others[path] = module
    return _Paths(
        tuple(_Linear(module, tuple(where)) for module, where in linears.items()), others, tuple(_stacks(others))
    )


def _stacks(others: Mapping[str, nn.Module]) -> Iterator[_Linear]:
    """Every parameter [E, N, K] of a module that is no linear."""
    where: dict[nn.Module, list[str]] = {}
    for path, module in others.items():
        where.setdefault(module, []).append(path)
    for module, paths in where.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and _ndim(parameter) == 3:
                yield _Linear(module, tuple(f"{path}.{name}".removeprefix(".") for path in paths), name)


def _ndim(parameter: nn.Parameter) -> int:
    return -1 if isinstance(parameter, nn.UninitializedParameter) else parameter.ndim


def _targeted(target_modules: object, paths: _Paths) -> list[tuple[_Linear, tuple[str, ...]]]:
    """Every targeted linear with those of its paths that are targeted."""
    if target_modules == ALL_LINEAR:
        return [(linear, linear.paths) for linear in paths.linears]
    assert isinstance(target_modules, tuple)
    for pattern in target_modules:
        if not any(matches(pattern, path) for linear in paths.linears for path in linear.paths):
            raise ValueError(_no_match("target_modules", pattern, paths))
    named = [
        (linear, tuple(path for path in linear.paths if any(matches(pattern, path) for pattern in target_modules)))
        for linear in paths.linears
    ]
    return [(linear, where) for linear, where in named if where]


def _targeted_stacks(
    target_parameters: object, paths: _Paths, model: nn.Module
) -> list[tuple[_Linear, tuple[str, ...]]]:
    """Every targeted parameter with those of its paths that are targeted."""
    assert isinstance(target_parameters, tuple)
    for pattern in target_parameters:
        if any(matches(pattern, path) for stack in paths.stacks for path in stack.paths):
            continue
        others = [name for name, _ in model.named_parameters() if matches(pattern, clean_path(name))]
        if others:
            shape = list(model.get_parameter(others[0]).shape)
            raise ValueError(
                f"target_parameters: {pattern!r} matches {clean_path(others[0])} {shape}, which is no stack of "
                f"matrices [E, N, K] outside of a linear: linears are named in target_modules"
            )
        known = [path for stack in paths.stacks for path in stack.paths]
        raise ValueError(
            f"target_parameters: {pattern!r} matches no parameter. A name matches whole path segments from the end. "
            + (_near_misses(pattern, known, "stacks of matrices") if known else "The model has no parameter [E, N, K]")
        )
    named = [
        (stack, tuple(path for path in stack.paths if any(matches(pattern, path) for pattern in target_parameters)))
        for stack in paths.stacks
    ]
    return [(stack, where) for stack, where in named if where]


def _without_excluded(
    targeted: list[tuple[_Linear, tuple[str, ...]]], exclude_modules: object, paths: _Paths
) -> list[_Linear]:
    assert isinstance(exclude_modules, tuple)
    for pattern in exclude_modules:
        known = (*paths.linears, *(found for found, _ in targeted if found.parameter is not None))
        if not any(_covers(pattern, path) for found in known for path in found.paths):
            raise ValueError(_no_match("exclude_modules", pattern, paths))
    kept = []
    for linear, where in targeted:
        excluded = [path for path in linear.paths if any(_covers(pattern, path) for pattern in exclude_modules)]
        wanted = [path for path in where if path not in excluded]
        if excluded and wanted:
            raise ValueError(
                f"{wanted[0]} and {excluded[0]} are the same module, and only one of the names is excluded: "
                f"exclude both (exclude_modules=[..., {wanted[0]!r}]) or neither"
            )
        if wanted:
            kept.append(linear)
    return kept


def _without_saved(targeted: list[_Linear], saved: Mapping[nn.Module, str], config: LoRAConfig) -> list[_Linear]:
    kept = [linear for linear in targeted if linear.module not in saved]
    patterns: object = config.target_modules
    for pattern in patterns if isinstance(patterns, tuple) else ():
        named = [linear for linear in targeted if any(matches(pattern, path) for path in linear.paths)]
        if named and all(linear.module in saved for linear in named):
            raise ValueError(
                f"target_modules: {pattern!r} names only what modules_to_save trains whole "
                f"({_listed([linear.paths[0] for linear in named])}): drop it from one of the two"
            )
    if not kept:
        raise ValueError("modules_to_save leaves no linear to adapt")
    return kept


def _covers(pattern: str, path: str) -> bool:
    """Whether `pattern` matches `path` or a module that holds it."""
    segments = path.split(".")
    return any(matches(pattern, ".".join(segments[:end])) for end in range(1, len(segments) + 1))


def _numbers(field: str, patterns: Mapping[Any, Number], kept: Sequence[_Linear], paths: _Paths) -> dict[str, Number]:
    """The number that `patterns` gives to each adapted linear that one of them matches, by its first path."""
    found: dict[str, tuple[str, Number]] = {}
    for pattern, number in patterns.items():
        assert isinstance(pattern, str)
        hits = [linear for linear in kept if any(matches(pattern, path) for path in linear.paths)]
        if not hits:
            raise ValueError(_no_match(field, pattern, paths))
        for linear in hits:
            path = linear.paths[0]
            earlier, value = found.setdefault(path, (pattern, number))
            if value != number:
                names = "" if len(linear.paths) == 1 else f" (also known as {', '.join(linear.paths[1:])})"
                raise ValueError(
                    f"{field}: {earlier!r} gives {path}{names} {value:g} and {pattern!r} gives it {number:g}; "
                    f"make the patterns exclude one another"
                )
    return {path: number for path, (_, number) in found.items()}


def _no_match(field: str, pattern: str, paths: _Paths) -> str:
    """Why `pattern` has no effect, and what its writer may have meant."""
    linear_paths = [path for linear in paths.linears for path in linear.paths]
    if any(matches(pattern, path) for path in linear_paths):
        return f"{field}: {pattern!r} matches only linears that are not adapted: target them, or drop the entry"
    hits = [path for path in paths.others if path and matches(pattern, path)]
    if hits:
        kind = type(paths.others[hits[0]]).__name__
        below = [path for path in linear_paths if any(path.startswith(hit + ".") for hit in hits)]
        hint = f"; the linears below it: {_listed(below)}" if below else conv1d_hint(paths.others[hits[0]])
        return f"{field}: {pattern!r} matches only modules that are no nn.Linear ({_listed(hits)}: {kind}){hint}"
    return f"{field}: {pattern!r} matches no module. {_RULE} {_near_misses(pattern, linear_paths, 'linears')}"


def _near_misses(pattern: str, paths: list[str], kind: str) -> str:
    text = pattern.removeprefix("re:")
    # Compared with paths of as many segments as were written: "atention.wq" is nearer to "attention.wq" than to "wq".
    depth = text.count(".") + 1
    names = list(dict.fromkeys(".".join(path.split(".")[-depth:]) for path in paths if path))
    near = difflib.get_close_matches(text, names, n=5, cutoff=0.5)
    near += [name for name in names if text.lower() in name.lower() and name not in near]
    if near:
        return f"Near misses: {_listed(near)}"
    return f"The {kind} are called: {_listed(names) or 'nothing (the model itself is one)'}"


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
