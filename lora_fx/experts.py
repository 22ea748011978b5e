"""Swapped experts: a module whose parameters are stacks of matrices, with an adapter for each matrix of some of them.

    module.__class__ = experts_class(type(module))       # MixtralExperts -> LoRAMixtralExperts
    w1 [E, N, K]:  w1_lora_a [E, R, K], w1_lora_b [E, N, R]    y_e = x_e W_e^T + s (x_e A_e^T) B_e^T

The parent's forward runs with a stand-in for `self`, which has an `AdaptedWeight` where the module has an adapted
parameter, and is the module in all else. So the forward is the parent's own, whichever way it multiplies (grouped
products, batched ones, a loop over experts), no per-expert delta is ever formed, and what reads a parameter elsewhere
(initialisation, checkpoints, parallelism) sees the parameter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_fx import _torch
from lora_fx.adapted import BUFFERS, Adapted, parent_class, swapped_class
from lora_fx.adapted_weight import AdaptedWeight
from lora_fx.inits import reset_factors
from lora_fx.linear import DEFAULT_NAME
from lora_fx.packed import check_not_quantised
from lora_fx.placements import fill, is_dtensor, local_expert_factor, placed_experts
from lora_fx.stored import ENABLED, SCALE, fill_numbers, keep_numbers, note_loaded_scale, number

A, B = "_lora_a", "_lora_b"
EXPERT_ATTRIBUTES = (
    "lora_dropout",
    "lora_init",
    "_lora_last_scale",
    "_lora_deferred",
    "_lora_active",
    "_lora_disabled",
    "_lora_merged",
    "_lora_rows",
    "_lora_base",
    "_lora_names",
    "_lora_transposed",
)


@dataclass(frozen=True)
class ExpertAdapter:
    """What the swap adds for one parameter [E, N, K], or [E, K, N] where the module says that it is transposed.

    Args:
        name: the parameter.
        lora_a: [E, R, K].
        lora_b: [E, N, R].
        scale: multiplies the low-rank products.
    """

    name: str
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float


class LoRAExpertsModule(Adapted):
    """The half of swapped experts that is not its parent: every `LoRA<Parent>` derives from this and from Parent.

    Parameters, for each adapted parameter ``w`` [E, N, K]:
        w_lora_a: [E, R, K], trainable.
        w_lora_b: [E, N, R], trainable, zero at first.

    Buffers, with one number for each adapted parameter, in the order of `adapted_parameters`: `lora_scale` and
    `lora_enabled`, see `Adapted`.
    """

    _lora_parent: type[nn.Module]
    _lora_view: type["_View"]
    _lora_names: tuple[str, ...] = ()
    _lora_transposed: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parent = cls.__dict__.get("_lora_parent")
        if parent is not None:
            _torch.dispatch_grouped_mm()
            cls._lora_view = type(f"{parent.__name__}View", (_View, parent), {"__module__": parent.__module__})

    @property
    def adapted_parameters(self) -> tuple[str, ...]:
        """The names of the parameters that have adapters."""
        return self._lora_names

    @property
    def lora_parameters(self) -> tuple[str, ...]:  # type: ignore[override]  # of linears the class knows
        """The names of the factors, for each adapted parameter A and then B."""
        return tuple(name + end for name in self._lora_names for end in (A, B))

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [E, R, K] and B [E, N, R] of one adapted parameter."""
        a, b = self._parameters[name + A], self._parameters[name + B]
        assert a is not None and b is not None
        return a, b

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, with adapted weights."""
        view = object.__new__(self._lora_view)
        view.__dict__["_lora_module"] = self
        # Not `view.forward`: Dynamo looks into a forward that has a closure only if it knows where it is from.
        return self._lora_parent.forward(view, *args, **kwargs)

    def adapted_weight(self, name: str) -> AdaptedWeight:
        """What stands for the parameter `name` in the forward; of a distributed one, this rank's part."""
        base: Any = self._parameters[name]
        lora_a, lora_b = self.factors(name)
        index = self._lora_names.index(name)
        scale = self.lora_scale[index] * self.lora_enabled[index]
        # A column-wise or row-wise part of each expert makes the factors' gradients on this rank terms of a sum.
        left, right = local_expert_factor(lora_b, base), local_expert_factor(lora_a, base)
        if self._lora_transposed:
            left, right = right.mT, left.mT
        own = base.to_local() if is_dtensor(base) else base
        return AdaptedWeight(own, left, right, scale, self.lora_dropout if self.training else 0.0, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module's, except that the factors of a distributed weight go where the weight wants them.

        Also those that are plain: whoever shards experts registers the weights, and knows nothing of factors.

        Raises:
            ValueError: a packed weight is to take the place of one that is not, as for `LoRAModule`.
        """
        held = self._parameters.get(name)
        if name in self._lora_names and held is not None and param is not None:
            check_not_quantised(self, held, param)
        super().register_parameter(name, param)
        for weight in self._lora_names:
            if name in (weight, weight + A, weight + B):
                for end in (A, B):
                    factor, base = self._parameters.get(weight + end), self._parameters.get(weight)
                    if factor is not None and base is not None:
                        self._parameters[weight + end] = placed_experts(
                            end.removeprefix("_"), factor, base, self._lora_transposed
                        )

    def holder(self, adapter: str | None) -> "LoRAExpertsModule | None":
        """What has the tensors and numbers of `adapter`: experts have one, and this is it."""
        return self if adapter in (None, self._lora_active) else None

    @property
    def lora_adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are not active: none."""
        return ()

    @torch.no_grad()
    def reset_adapters(self) -> None:
        """Start the adapters afresh: A as `lora_init` says, B zero, the last scales that were installed or loaded.

        Raises:
            ValueError: they are merged.
        """
        self.check_start()
        for name in self._lora_names:
            reset_stacks(*self.factors(name), self.lora_init)
        fill_numbers(self.lora_scale, self._lora_last_scale)
        if self.lora_enabled is not self._lora_disabled:
            self.lora_enabled.fill_(1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRAExpertsModule":
        """Move or convert as any module, except that the numbers stay what they are."""
        before = {name: self._buffers[name] for name in BUFFERS}
        super()._apply(fn, recurse)
        keep_numbers(self, before)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        note_loaded_scale(self)
        if self.lora_enabled.is_meta and not self.lora_scale.is_meta:  # assign=True onto meta; this one is not saved
            self.lora_enabled = torch.ones_like(self.lora_scale)

    def reset_parameters(self) -> None:
        """The parent's `reset_parameters`, if it has one, then `reset_adapters`."""
        theirs = getattr(super(), "reset_parameters", None)
        if theirs is not None:
            theirs()
        self.reset_adapters()

    def extra_repr(self) -> str:
        shown = number(self.lora_scale) or self._lora_last_scale
        each = [f"{n}: rank={self.factors(n)[1].shape[-1]}, scale={s:g}" for n, s in zip(self._lora_names, shown)]
        return ", ".join(filter(None, (super().extra_repr(), *each, f"dropout={self.lora_dropout:g}")))


class _View:
    """Stands for a `LoRAExpertsModule` as `self` of its parent's forward, and of methods and properties used there."""

    def __getattr__(self, name: str) -> Any:
        module: LoRAExpertsModule = self.__dict__["_lora_module"]
        if name in module._lora_names:
            return module.adapted_weight(name)
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_lora_module"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_lora_module"], name)


def experts_class(parent: type[nn.Module]) -> type[LoRAExpertsModule]:
    """The subclass ``LoRA<Parent>`` of `parent`: always the same class for the same parent."""
    return swapped_class(LoRAExpertsModule, parent)


def is_transposed(module: nn.Module) -> bool:
    """Whether the matrices of `module` are [K, N] and not [N, K], as transformers' (and so PEFT's) modules say it."""
    return bool(getattr(module, "is_transposed", False))


def new_expert_adapter(module: nn.Module, name: str, *, rank: int, scale: float, init: str) -> ExpertAdapter:
    """The adapter for the parameter `name` of `module`, initialised, on its device; `module` is not touched."""
    weight: Any = module._parameters[name]
    count, *sizes = weight.shape
    n, k = reversed(sizes) if is_transposed(module) else sizes
    a = torch.empty(count, rank, k, dtype=weight.dtype, device=weight.device)
    b = torch.zeros(count, n, rank, dtype=weight.dtype, device=weight.device)
    reset_stacks(a, b, init)
    return ExpertAdapter(name, nn.Parameter(a), nn.Parameter(b), scale)


@torch.no_grad()
def reset_stacks(lora_a: Tensor, lora_b: Tensor, init: str) -> None:
    """Start A [E, R, K] and B [E, N, R], each expert as `init` says; distributed ones as a single process would."""
    whole = [
        torch.empty(factor.shape, dtype=factor.dtype, device=factor.device) if is_dtensor(factor) else factor
        for factor in (lora_a, lora_b)
    ]
    for a, b in zip(*whole):
        reset_factors(a, b, init, lora_a.shape[1])
    for factor, full in zip((lora_a, lora_b), whole):
        if full is not factor:
            fill(factor, full)


def swap_experts(
    module: nn.Module, adapters: Sequence[ExpertAdapter], *, dropout: float, init: str, name: str = DEFAULT_NAME
) -> None:
    """Make `module` a `LoRA<Parent>` that holds `adapters`, in this order, under a name. Undone by `unswap_experts`."""
    module.__class__ = experts_class(type(module))
    swapped = cast(LoRAExpertsModule, module)
    swapped._lora_names = tuple(adapter.name for adapter in adapters)
    swapped._lora_transposed = is_transposed(module)
    for adapter in adapters:
        swapped.register_parameter(adapter.name + A, adapter.lora_a)
        swapped.register_parameter(adapter.name + B, adapter.lora_b)
    scales = [adapter.scale for adapter in adapters]
    device = adapters[0].lora_a.device
    swapped.register_buffer(SCALE, torch.tensor(scales, dtype=torch.float32, device=device))
    ones = torch.ones(len(scales), dtype=torch.float32, device=device)
    swapped.register_buffer(ENABLED, ones, persistent=False)
    swapped.lora_dropout = dropout
    swapped.lora_init = init
    swapped._lora_last_scale = scales
    swapped._lora_disabled = None
    swapped._lora_deferred = False
    swapped._lora_merged = None
    swapped._lora_rows = None
    swapped._lora_base = None
    swapped._lora_active = name


def unswap_experts(module: LoRAExpertsModule) -> None:
    """Give `module` its parent's class back and take away all that the swap added, or as much of it as is there."""
    for name in (*module.lora_parameters, *BUFFERS, *EXPERT_ATTRIBUTES):
        if name in module._parameters or name in module._buffers or name in module.__dict__:
            delattr(module, name)
    module.__class__ = parent_class(type(module))  # type: ignore[assignment]  # of which its class is a subclass
