"""The forms that the GPU benchmarks compare, built from one frozen module so that all hold equal numbers.

An adapter goes by one name in every form, that of `lora_fx`: `<path of the linear>.lora_a` [R, K] and `.lora_b` [N, R],
`<path of the stack of experts>_lora_a` [E, R, K] and `_lora_b` [E, N, R].
"""

import copy
import functools
import importlib.util
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.cases import Case
from benchmarks.common import Form, install_plain_lora
from benchmarks.float8 import install_float8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from llama3 import Experts, LlamaConfig, TransformerBlock, rope_table
from llama3.moe import MixtureOfExperts, Router

FROZEN, EAGER, PLAIN, TUNED, PEFT, OURS = "frozen", "eager", "plain", "max-autotune", "peft", "lora_fx"
# name on the command line -> what the tables call it; in the order in which they are built and shown.
LABELS = {
    FROZEN: "frozen, compile",
    EAGER: "plain LoRA, eager",
    PLAIN: "plain LoRA, compile",
    TUNED: "plain LoRA, max-autotune",
    PEFT: "PEFT (bf16 adapters), compile",
    OURS: "lora_fx",
}

ROUTER = "router.gate"  # has fewer outputs than adapters have ranks

# Case.bias -> ends of the paths of the linears that have one.
_BIASED: dict[str, str | tuple[str, ...]] = {"none": (), "qkv": ("wq", "wk", "wv"), "all": ""}


@dataclass(frozen=True)
class BlockConfig(LlamaConfig):
    """A Llama whose feed-forward size is given, and not derived from its width."""

    ffn: int = 0

    @property
    def ffn_dim(self) -> int:
        return self.ffn


class Checkpointed(nn.Module):
    """A transformer block whose activations are recomputed in the backward, all of them."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """As the block's: [B, S, D] -> [B, S, D]."""
        return checkpoint(self.block, x, rope, use_reentrant=False)


class PlacedRouter(Router):
    """A router that sends a token where its place says, drawn at random; how much of each it still asks.

    Adapters, and what is rounded otherwise, would move tokens to other experts: forms would multiply different rows,
    and no gradient could be compared. torchtitan forces the load of a benchmark's experts likewise, to an even one.

    Places begin anew after as many sequences as `exact_values` takes at a time.
    """

    experts: Tensor

    def __init__(self, config: LlamaConfig, case: Case) -> None:
        super().__init__(config)
        places = min(case.tokens, sequences_at_once(case.length) * case.length)
        self.register_buffer("experts", torch.rand(places, config.n_experts).topk(self.chosen).indices)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """As the router's, of the tokens of whole sequences."""
        experts = self.experts.repeat(-(-scores.shape[0] // self.experts.shape[0]), 1)[: scores.shape[0]]
        return scores.gather(1, experts), experts


class Block(nn.Module):
    """The block of a case, which brings its rotary angles along: [B, S, D] -> [B, S, D]. Weights are random, frozen."""

    rope: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = {"n_kv_heads": case.kv_heads, "ffn": case.ffn, "n_experts": case.experts}
        config = BlockConfig(case.dim, 1, case.heads, vocab_size=1, **sizes)
        block = TransformerBlock(0, config)
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) and path.endswith(_BIASED[case.bias]):
                module.bias = nn.Parameter(torch.empty(module.out_features))
            if isinstance(module, MixtureOfExperts):
                module.router = PlacedRouter(config, case)
        for module in block.modules():
            if isinstance(module, (nn.Linear, Experts)):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, std=0.02)
        block.bfloat16()  # the angles stay float32, as in the model
        self.layer = Checkpointed(block) if case.checkpoint else block
        self.register_buffer("rope", rope_table(config.head_dim, case.length, config.rope_theta))
        self.requires_grad_(False).train(not case.no_grad)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.rope)


@dataclass
class LoRAForm(Form):
    """A form with its adapters by name; the frozen form has none."""

    adapters: dict[str, nn.Parameter] = field(default_factory=dict)

    def values(self, x: Tensor, upstream: Tensor | None) -> dict[str, Tensor]:
        """The output as "y" and, given its upstream gradient, the gradients of the input ("x") and of every adapter."""
        if upstream is None:
            with torch.no_grad():
                return {"y": self.model(x).clone()}
        y = self.model(x)
        # Clones: what CUDA graphs return is written over by the next step.
        gradients = torch.autograd.grad(y, [x, *self.adapters.values()], upstream)
        return {name: g.clone() for name, g in zip(("y", "x", *self.adapters), (y.detach(), *gradients))}

    def stepper(self, x: Tensor, upstream: Tensor | None) -> Callable[[], None]:
        """What is timed: the forward and, given an upstream gradient, the backward. It leaves no gradient behind."""
        leaves = [x, *self.adapters.values()]

        def infer() -> None:
            with torch.no_grad():
                self.model(x)

        def train() -> None:
            torch.autograd.grad(self.model(x), leaves, upstream)

        return infer if upstream is None else train


def available(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The forms of `names` that can run here, in the order of `LABELS`, and why the others cannot."""
    wanted = [name for name in LABELS if name in names]
    if PEFT in wanted and importlib.util.find_spec("peft") is None:
        return [name for name in wanted if name != PEFT], [f"{LABELS[PEFT]}: peft is not installed"]
    return wanted, []


def build_form(
    name: str,
    base: nn.Module,
    *,
    rank: int,
    dropout: float = 0.0,
    adapters: Mapping[str, Tensor] | None = None,
    fp8: bool = False,
    mode: str = "default",
    compiled: bool = True,
    strict: bool = True,
    parts: Callable[[nn.Module], Sequence[nn.Module]] | None = None,
    in_place: bool = False,
) -> LoRAForm:
    """One form of `base`, alpha being twice the rank.

    Args:
        name: a key of `LABELS`.
        base: the frozen module with plain linears; it is copied.
        rank, dropout: of the adapters.
        adapters: their values, by name; None leaves them uninitialised where the form does not initialise them.
        fp8: whether the frozen products run in float8.
        mode: of `torch.compile`.
        compiled: False leaves every form eager.
        strict: of `lora_fx.compile`: a branch that is left as it was is an error, and not silently measured.
        parts: which modules of the model are compiled, each by itself; the model as a whole when left out.
        in_place: use `base` itself, which then cannot serve another form.

    Returns:
        The form. Nothing is compiled yet: that happens at its first call.
    """
    model = base if in_place else copy.deepcopy(base)
    if parts is None:
        own_code(model)
    alpha = 2 * rank
    stacks = stacks_of(base)
    if name in (EAGER, PLAIN, TUNED) and not stacks:
        install_plain_lora(model, rank, alpha, dropout)
    if fp8:
        install_float8(model)
    if name == PEFT:
        install_peft(model, rank, alpha, dropout)
    elif name == OURS or (stacks and name != FROZEN):  # plain: the same modules, without passes
        lora_fx.install(model, lora_config(model, rank, dropout))
    else:
        assert name in LABELS, name
    compiled = compiled and name != EAGER
    form = LoRAForm(LABELS[name], model, compiled, {} if name == FROZEN else adapters_of(model))
    if adapters is not None:
        copy_adapters(adapters, form.adapters)
    for part in ([model] if parts is None else parts(model)) if compiled else ():
        # Static shapes: a benchmark of one shape must not be one of a graph that serves several.
        options: dict[str, Any] = {"mode": _tuned(mode) if name == TUNED else mode, "dynamic": False}
        if name == OURS:
            lora_fx.compile(part, strict=strict, **options)
        else:
            part.compile(**options)
    return form


def lora_config(model: nn.Module, rank: int, dropout: float) -> lora_fx.LoRAConfig:
    """Adapters for every linear of `model`, and for its experts where it has some, but not for their router."""
    stacks = stacks_of(model)
    excluded = [ROUTER] if stacks else []
    return lora_fx.LoRAConfig(
        rank=rank, alpha=2 * rank, dropout=dropout, target_parameters=stacks, exclude_modules=excluded
    )


def stacks_of(model: nn.Module) -> list[str]:
    """The paths of the weights of experts."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    return [f"{path}.{name}" for path, module in found.items() for name in ("w1", "w2", "w3")]


def own_code(model: nn.Module) -> None:
    """Give `model` a class of its own with a copy of its `forward`.

    Dynamo keeps what it compiled on the code object and searches it at every call: of several forms that share one, the
    last to be compiled would pay for the guards of all before it.
    """
    cls, forward = type(model), type(model).forward
    own = types.FunctionType(forward.__code__.replace(), forward.__globals__, "forward", None, forward.__closure__)
    model.__class__ = type(cls.__name__, (cls,), {"forward": own, "__module__": cls.__module__})


def _tuned(mode: str) -> str:
    return "max-autotune" if mode == "reduce-overhead" else "max-autotune-no-cudagraphs"


def install_peft(model: nn.Module, rank: int, alpha: int, dropout: float) -> None:
    """PEFT's LoRA on every linear of `model`, its adapters in the dtype of the weights (PEFT's default is float32)."""
    import peft

    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    dtype = next(iter(linears.values())).weight.dtype
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(linears))
    peft.inject_adapter_in_model(config, model)
    model.train(model.training)  # what PEFT adds is in training mode, whatever the model is in
    model.requires_grad_(False)
    for parameter in adapters_of(model).values():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_()


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters of a model by the names that `lora_fx` gives them, sorted."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name.replace(".lora_A.default.weight", ".lora_a").replace(".lora_B.default.weight", ".lora_b")
        if name.endswith(("lora_a", "lora_b")):
            found[name] = parameter
    return dict(sorted(found.items()))


def random_adapters(model: nn.Module, rank: int, seed: int) -> dict[str, Tensor]:
    """Values for the adapters of every linear of `model` but routers, and of its experts, B away from zero.

    They are on its device and in its dtype.
    """
    weight = next(module.weight for module in model.modules() if isinstance(module, nn.Linear))
    generator = torch.Generator(weight.device).manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, device=weight.device)
    values = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not path.endswith(ROUTER):
            a, b = draw(rank, module.in_features), draw(module.out_features, rank)
            values[f"{path}.lora_a"] = (a * module.in_features**-0.5).to(weight.dtype)
            values[f"{path}.lora_b"] = (b * 0.1 * rank**-0.5).to(weight.dtype)
    for path in stacks_of(model):
        experts, n, k = model.get_parameter(path).shape
        a, b = draw(experts, rank, k), draw(experts, n, rank)
        values[f"{path}_lora_a"] = (a * k**-0.5).to(weight.dtype)
        values[f"{path}_lora_b"] = (b * 0.1 * rank**-0.5).to(weight.dtype)
    return values


@torch.no_grad()
def copy_adapters(values: Mapping[str, Tensor], adapters: Mapping[str, nn.Parameter]) -> None:
    """Write `values` into `adapters`; without effect on the frozen form, which has none."""
    if adapters and adapters.keys() != values.keys():
        raise ValueError(f"adapters {sorted(adapters.keys() ^ values.keys())} are in one of the two only")
    for name, parameter in adapters.items():
        parameter.copy_(values[name])


def exact_values(
    base: nn.Module, adapters: Mapping[str, Tensor], x: Tensor, upstream: Tensor | None
) -> dict[str, Tensor]:
    """What `LoRAForm.values` should be, in float64: plain LoRA, eager, without dropout and float8.

    Some sequences at a time, since attention in float64 writes its scores to memory. Gradients of the adapters are sums
    over the sequences.
    """
    rank = next(iter(adapters.values())).shape[0]
    oracle = build_form(EAGER, base, rank=rank, adapters=adapters)
    oracle.model.double()
    count = sequences_at_once(x.shape[1])
    parts: list[dict[str, Tensor]] = []
    for start in range(0, x.shape[0], count):
        some = x[start : start + count].detach().double().requires_grad_(upstream is not None)
        dy = None if upstream is None else upstream[start : start + count].double()
        parts.append(oracle.values(some, dy))
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name in ("y", "x")}
    return whole | {name: torch.stack([p[name] for p in parts]).sum(0) for name in parts[0] if name not in whole}


def sequences_at_once(length: int) -> int:
    """Of how many sequences of this length `exact_values` computes at a time."""
    return max(1, 2048 // length)


def worst_error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> tuple[str, float]:
    """Which tensor is furthest off, and its error: the norm of the difference over the norm of the exact one."""
    if found.keys() != exact.keys():
        raise ValueError(f"{sorted(found.keys() ^ exact.keys())} are in one of the two only")
    errors = {name: ((found[name].double() - e).norm() / e.norm()).item() for name, e in exact.items()}
    worst = max(errors, key=lambda name: errors[name])
    return worst, errors[worst]
