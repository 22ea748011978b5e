"""One line for users, and the Dynamo backend behind it.

``lora_fx.compile(model)`` compiles the model in place with Inductor and the passes of :mod:`lora_fx.passes`.
``torch.compile(model, backend="lora_fx")`` does the same for a model whose adapters are installed already; the name is
registered by this package's entry point in the group ``torch_dynamo_backends``.

Everything is scoped to the one compilation: the passes travel as Inductor options of that compilation, and neither
``torch._inductor.config`` nor any other model sees them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from lora_fx._torch import compile_in_place
from lora_fx.adapted import Adapted
from lora_fx.beside import lay_beside
from lora_fx.config import LoRAConfig
from lora_fx.install import install
from lora_fx.passes.pipeline import hooks
from lora_fx.record import check_kept

Model = TypeVar("Model", bound=nn.Module)


def compile(  # the name that torch and nn.Module use for it
    model: Model,
    config: LoRAConfig | None = None,
    *,
    strict: bool = False,
    backend: str = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Model:
    """Install adapters if the model has none, and compile it in place with the LoRA passes.

    The model is the same object with the same parameter names afterwards (no ``_orig_mod.``), so checkpoints,
    optimizers and hooks keep working. Compilation happens at the first call, as with ``torch.compile``.

    On a GPU, frozen weights and the ``lora_a`` of each move to memory in which they lie together, some hundred MiB at a
    time, so that one product can compute both (`lora_fx.beside`): shard, move and load before this, and compile parts
    that share a weight together. Of ranks above 64 the rows of some weights get room for those of ``lora_b`` instead,
    and lie further apart than they are long; state dicts have copies of those without gaps. The parameters stay the
    objects that they were; what else shares the memory of one from outside the model keeps the old memory, and storages
    cannot be resized afterwards.

    Args:
        model: The model, or a part of one whose adapters are installed (a block compiled by itself, say).
        config: How to adapt the model; ``LoRAConfig()`` when it is left out and the model has no adapters.
        strict: Raise :class:`~lora_fx.passes.pipeline.LoRARewriteError` at compilation when a LoRA branch is left as it
            was, instead of compiling it unfused. ``lora_fx.explain`` says why without compiling.
        backend: ``"inductor"``, the only backend that the passes run in.
        mode: As for ``torch.compile``; may be given together with ``options``, which win where both speak.
        options: Inductor options, as for ``torch.compile``. Passes of your own on the hooks that this package uses
            (``joint_custom_pre_pass`` and ``joint_custom_post_pass``, ``post_grad_custom_pre_pass`` and
            ``post_grad_custom_post_pass``) run before ours.
        dynamic: As for ``torch.compile``.
        **kwargs: Everything else that ``torch.compile`` takes (``fullgraph``, ``disable``, ...).

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module, or is what ``torch.compile`` returned.
        ValueError: another backend; a ``config`` for a model that has adapters; no ``config`` for a model that is
            frozen already but has no adapters; adapters that were lost since they were installed; and whatever
            :func:`lora_fx.install` raises. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lora_fx.compile takes an nn.Module, not {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("this is what torch.compile(model) returned; call lora_fx.compile on the model itself instead")
    if backend not in ("inductor", "lora_fx"):
        raise ValueError(
            f"backend={backend!r}: the LoRA passes run inside Inductor. To use another backend, call "
            f"lora_fx.install(model, config) and then torch.compile(model, backend={backend!r}), without the rewrite."
        )
    merged = inductor_options(mode, options, dynamic, strict=strict)
    check_kept(model)
    adapted = any(isinstance(module, Adapted) for module in model.modules())
    if adapted and config is not None:
        raise ValueError(
            "the model has adapters already: call lora_fx.compile(model) without a config, or lora_fx.remove it first"
        )
    if not adapted:
        parameters = list(model.parameters())
        if config is None and parameters and not any(p.requires_grad for p in parameters):
            raise ValueError(
                "the model is frozen and has no adapters. Pass a LoRAConfig to adapt it; "
                "or, if it is a part that is meant to have none, use torch.compile"
            )
        # torch.compile looks at its arguments when it is called, not when it compiles: a wrong one is refused here.
        torch.compile(_nothing, options=merged, dynamic=dynamic, **kwargs)
        install(model, config or LoRAConfig())
    lay_beside(model)
    compile_in_place(model, options=merged, dynamic=dynamic, **kwargs)
    return model


def _nothing() -> None:
    """Stands in for a model."""


def backend(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[torch.Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend ``"lora_fx"``: Inductor with the LoRA passes.

    For ``torch.compile(model, backend="lora_fx")``, ``module.compile(backend="lora_fx")`` and trainers that take the
    name of a backend. ``mode`` and ``options`` are those of ``torch.compile``.
    """
    from torch._inductor.compile_fx import compile_fx

    patches = inductor_options(mode, options, dynamic)
    return cast(Callable[..., Any], compile_fx(graph, example_inputs, config_patches=patches))


def inductor_options(
    mode: str | None, options: dict[str, Any] | None, dynamic: bool | None = None, *, strict: bool = False
) -> dict[str, Any]:
    """Inductor options for ``mode`` and ``options`` together with the passes.

    ``torch.compile`` refuses ``mode`` with ``options``; a mode is a set of options, so the two are merged here.
    """
    merged: dict[str, Any] = {}
    if mode is not None and mode != "default":
        merged.update(torch._inductor.list_mode_options(mode, dynamic))
    merged.update(options or {})
    return hooks({name.replace("-", "_"): value for name, value in merged.items()}, strict=strict)
