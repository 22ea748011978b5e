"""Adapters of experts in PEFT's files, where a parameter [E, N, K] is a wrapper around its module (peft 0.21).

    <module>.lora_A.weight [E R, K]      A [E, R, K], expert after expert
    <module>.lora_B.weight [N, R E]      B [E, N, R] as [N, R, E]: the experts of one column side by side

The wrappers of several parameters of one module are nested in the order in which the module registers them, the last
one outermost: with gate_up_proj and down_proj, ``<module>.lora_A`` is down_proj's and ``<module>.base_layer.lora_A``
is gate_up_proj's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lora_fx.branches import sizes
from lora_fx.config import matches
from lora_fx.peft_files import AdapterFiles, Factors, check_rank

_INNER = ".base_layer"


def wrapper_paths(module: str, parameters: Sequence[str]) -> dict[str, str]:
    """The path in PEFT's keys of each adapted parameter of `module`, given in the order of registration."""
    last = len(parameters) - 1
    return {parameter: module + _INNER * (last - index) for index, parameter in enumerate(parameters)}


def packed(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """A [E, R, K] and B [E, N, R] as the matrices [E R, K] and [N, R E] that PEFT keeps."""
    return lora_a.flatten(0, 1), lora_b.permute(1, 2, 0).flatten(1, 2).contiguous()


def unpacked(lora_a: Tensor, lora_b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The inverse of `packed`."""
    a = lora_a.unflatten(0, (experts, -1))
    return a, lora_b.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class ExpertFactors:
    """What files hold for one parameter, with its path and its module in the model."""

    path: str
    module: nn.Module
    parameter: str
    factors: Factors


def match_experts(modules: Mapping[str, nn.Module], files: AdapterFiles) -> tuple[list[ExpertFactors], set[str]]:
    """What `files` hold for parameters, and the paths in the files that are accounted for by that.

    Args:
        modules: every module of the model by its path.
        files: as read.

    Raises:
        ValueError: the configuration names parameters and the tensors are not theirs, or do not fit them.
    """
    found: list[ExpertFactors] = []
    used: set[str] = set()
    seen: set[int] = set()
    for path, module in modules.items():
        if not files.config.target_parameters or isinstance(module, nn.Linear) or id(module) in seen:
            continue
        seen.add(id(module))
        names = [name for name, _ in module.named_parameters(recurse=False)]
        names = [name for name in names if files.config.targets_parameter(f"{path}.{name}".removeprefix("."))]
        for name, where in wrapper_paths(path, names).items():
            if where not in files.factors:
                raise ValueError(
                    f"{files.tensors} lacks {where}.lora_A.weight and lora_B.weight, which are {path}.{name}'s, and "
                    f"target_parameters in {files.config.file} names that: save the adapter again"
                )
            used.add(where)
            found.append(ExpertFactors(f"{path}.{name}", module, name, _fitting(files, module, path, name, where)))
    for name in files.config.target_parameters:
        if not any(matches(name, each.path) for each in found):
            raise ValueError(
                f"{files.config.file}: target_parameters names {name}, and the model has no such stack of matrices "
                f"[E, N, K] outside of a linear: load the adapter into the model it was trained on"
            )
    return found, used


def _fitting(files: AdapterFiles, module: nn.Module, path: str, name: str, where: str) -> Factors:
    weight = module.get_parameter(name)
    lora_a, lora_b = files.factors[where].lora_a, files.factors[where].lora_b
    if weight.ndim != 3:
        raise ValueError(
            f"{files.tensors} has an adapter for {path}.{name} {list(weight.shape)}, which is no stack of matrices "
            f"[E, N, K] outside of a linear: such parameters are not adapted here"
        )
    (experts,), n, k = sizes(module, name)
    rank, rest = divmod(len(lora_a), experts)
    if rest or [lora_b.shape[0], lora_a.shape[1]] != [n, k]:
        raise ValueError(
            f"{path}.{name} is {experts} matrices {[n, k]} in the model, and {files.tensors} has lora_A "
            f"{list(lora_a.shape)} and lora_B {list(lora_b.shape)} for it: load the adapter into the model it was "
            f"trained on"
        )
    check_rank(files.config, files.tensors, f"{path}.{name}", rank)
    return Factors(*unpacked(lora_a, lora_b, experts))
