"""What an adapter's files get of a model: the values of its adapters, and the configuration that says what they are."""

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.branches import Branch
from lora_fx.dora import DoRAModule
from lora_fx.experts import LoRAExpertsModule
from lora_fx.inits import plain_factors
from lora_fx.install import configs
from lora_fx.peft_config import config_values, hides
from lora_fx.peft_experts import packed, wrapper_paths
from lora_fx.peft_files import Factors
from lora_fx.placements import gathered
from lora_fx.targets import clean_path


def gathered_factor(factor: nn.Parameter | None) -> Tensor:
    """The global values of a factor, on the CPU, in memory of their own; a collective call."""
    assert factor is not None
    full = gathered(factor.detach())
    return full if full.is_meta else full.to("cpu", copy=True).contiguous()


def checked_adapter(branch: Branch, holder: Any, held: Mapping[str, Tensor]) -> Factors:
    """The factors that `holder` has for `branch`, after a look at what is to be written.

    They are cut to the adapter's rank, unless something was written behind it.

    Raises:
        ValueError: they are flat shards, on the meta device or not finite, or the module has no path.
    """
    path, lora_a, lora_b = branch.path, held["lora_a"], held["lora_b"]
    if not path or path == branch.parameter:
        raise ValueError(
            "the model is itself the adapted module, and PEFT's format has no name for that: save the module that "
            "holds it"
        )
    rank = lora_b.shape[-1]
    wanted = branch.shapes(rank)
    if [list(lora_a.shape), list(lora_b.shape)] != wanted:
        raise ValueError(
            f"{path} has factors of shapes {list(lora_a.shape)} and {list(lora_b.shape)}, not {wanted}: inside "
            f"FullyShardedDataParallel, save within FullyShardedDataParallel.summon_full_params(model)"
        )
    scale = branch.scale_of(holder)
    if lora_a.is_meta or scale.is_meta:
        raise ValueError(f"{path} is on the meta device: there are no values to save yet")
    if not all(torch.isfinite(tensor).all() for tensor in (*held.values(), scale)):
        raise ValueError(f"{path} holds NaN or infinity: nothing was written, so that the last good files stay")
    if branch.parameter is not None:
        return Factors(lora_a, lora_b)
    own = holder._lora_rank
    if lora_a[own:].any() or lora_b[:, own:].any():
        own = rank
    return Factors(**{**held, "lora_a": lora_a[:own].contiguous(), "lora_b": lora_b[:, :own].contiguous()})


def plain_adapter(branch: Branch, holder: Any, factors: Factors) -> tuple[Factors, float]:
    """The factors and the scale of what an adapter of a module adds to its base as everybody has it."""
    scale = branch.scale_of(holder).item()
    if branch.module._lora_base is None:
        return factors, scale
    lora_a, lora_b, scale = plain_factors(branch.module._lora_base, factors.lora_a, factors.lora_b, scale)
    return Factors(lora_a, lora_b), scale


def in_files(found: dict[str, Branch], factors: dict[str, Factors]) -> dict[str, Factors]:
    """The factors as matrices, under the paths that PEFT gives them."""
    result = {}
    for path, both in factors.items():
        module, parameter = found[path].module, found[path].parameter
        if parameter is not None:
            assert isinstance(module, LoRAExpertsModule)
            path = wrapper_paths(path.removesuffix("." + parameter), module.adapted_parameters)[parameter]
            both = Factors(*packed(both.lora_a, both.lora_b))
        result[path] = both
    return result


def written_config(
    model: nn.Module,
    holders: Mapping[str, Any],
    plain: dict[str, tuple[Factors, float]],
    trained: list[str],
    parameters: list[str],
) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Args:
        model: which is saved.
        holders: what has the adapter of each adapted linear, by path.
        plain: factors and scale of each that is written.
        trained: paths of the modules that are trained whole.
        parameters: which of the paths are those of parameters of experts.
    """
    dropouts = Counter(holders[path].lora_dropout for path in plain)
    dropout = dropouts.most_common(1)[0][0]
    if len(dropouts) > 1:
        warnings.warn(
            f"PEFT's format has one dropout for all modules: wrote {dropout:g}, the most frequent of "
            f"{', '.join(f'{value:g}' for value in sorted(dropouts))}",
            stacklevel=3,
        )
    if parameters and dropout:
        warnings.warn(
            f"PEFT has no dropout beside adapters of experts: wrote lora_dropout 0 instead of {dropout:g}",
            stacklevel=3,
        )
        dropout = 0.0
    if hidden := [path for path in plain if hides(trained, path)]:
        warnings.warn(
            f"PEFT leaves out every linear whose path holds a name of modules_to_save ({', '.join(trained)}), and so "
            f"the adapter of {hidden[0]} ({len(hidden)} in all); load_adapter reads it",
            stacklevel=3,
        )
    dora = {path: isinstance(holders[path], DoRAModule) for path in plain if path not in parameters}
    if len(set(dora.values())) > 1:
        ours, other = (next(path for path, value in dora.items() if value is kind) for kind in (True, False))
        raise ValueError(
            f"{ours} has DoRA's magnitudes and {other} has none, which PEFT's format cannot say: save each part by "
            f"itself"
        )
    installed = configs(model)
    return config_values(
        {path: factors.rank for path, (factors, _) in plain.items()},
        {path: scale for path, (_, scale) in plain.items()},
        others={clean_path(path) for path, _ in model.named_modules()} - plain.keys(),
        parameters=parameters,
        trained=trained,
        dropout=dropout,
        use_rslora=bool(installed) and all(config.use_rslora for config in installed),
        use_dora=any(dora.values()),
        inits={holders[path].lora_init for path in plain},
        base=getattr(model, "name_or_path", None) or None,
    )
