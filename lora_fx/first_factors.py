"""What `lora_fx.disabled` does with linears whose base an initialisation changed: the first factors complete it."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lora_fx import _torch
from lora_fx.linear import LoRAModule
from lora_fx.placements import like_weight, replicated_like
from lora_fx.targets import clean_path
from lora_fx.trained import OWNERS


@contextlib.contextmanager
def with_first_factors(modules: Sequence[tuple[str, LoRAModule]]) -> Iterator[None]:
    """Within this context `modules` compute what they would without adapters, up to the rounding of the residual.

    Others take the factors' places, and require gradients where those do: nothing recompiles. With dropout it does,
    once, because the part of the base that is in the factors must not be dropped.

    Args:
        modules: with their paths; each has a changed base.

    Raises:
        ValueError: one is sharded by FSDP, which owns its factors.
    """
    for path, module in modules:
        wrapper = _torch.data_parallel_wrapper(module)
        if wrapper in OWNERS:
            raise ValueError(
                f"{clean_path(path) or 'the model'} keeps a part of its base in its factors "
                f"(init={module.lora_init!r}) and is sharded by {wrapper}, which owns them: lora_fx.disabled needs the "
                f"first ones back. Use a model that is not sharded for that"
            )
    before = []
    try:
        with torch.inference_mode(False):
            for _, module in modules:
                base = module._lora_base
                assert base is not None
                before.append((module, dict(module._parameters), module.lora_scale, module.lora_dropout, base.shown))
                for name, value in (("lora_a", base.lora_a), ("lora_b", base.lora_b)):
                    module._parameters[name] = _stand_in(name, value, module)
                scale = torch.full((), base.scale, dtype=torch.float32, device=module.lora_scale.device)
                module.lora_scale = replicated_like(scale, module.weight)
                module.lora_dropout, base.shown = 0.0, True
        yield
    finally:
        for module, parameters, scale, dropout, shown in before:
            module._parameters.update(parameters)
            module.lora_scale = scale.to(module.lora_scale.device)  # the model may have been moved in between
            module.lora_dropout = dropout
            if module._lora_base is not None:
                module._lora_base.shown = shown


@torch.no_grad()
def _stand_in(name: str, value: Tensor, module: LoRAModule) -> nn.Parameter:
    factor = module._parameters[name]
    assert factor is not None
    moved = like_weight(name, value.to(factor.device, factor.dtype), module.weight)
    return nn.Parameter(moved, requires_grad=factor.requires_grad)
