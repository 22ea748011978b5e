"""One rank's part of a Llama with adapters: pipeline stages, tensor and sequence parallelism, FSDP, context parallel.

The order is always the same: install, cut into stages, parallelise, freeze, compile, shard, then fill with values.
Until that last step everything is on the meta device, so no rank ever holds more than its shards and one layer.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import lora_fx
from llama3 import Llama, LlamaConfig, MixtureOfExperts, rope_table
from llama3.model import Attention
from lora_fx import LoRAConfig
from lora_fx.adapted import Adapted
from lora_fx.placements import fill
from ring_attention import attention_over, shard_sequence


@dataclass(frozen=True)
class Degrees:
    """How many ranks share the work along each dimension: pipeline, data, context, tensor.

    `ep` of the data-parallel ranks hold the experts of a mixture between them.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name, degree in vars(self).items():
            if degree < 1:
                raise ValueError(f"--{name} {degree} is not positive")
        if self.dp % self.ep:
            raise ValueError(f"--ep {self.ep} must divide --dp {self.dp}: data-parallel ranks hold the experts")

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def mesh(self, device: torch.device) -> DeviceMesh:
        """The mesh of all ranks; neighbours share a tensor-parallel group."""
        sizes = {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}
        if self.ep > 1:
            sizes = {"pp": self.pp, "dp_outer": self.dp // self.ep, "ep": self.ep, "cp": self.cp, "tp": self.tp}
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        if self.ep > 1:
            mesh["dp_outer", "ep"]._flatten("dp")
        return mesh


def layers_of_stage(n_layers: int, stage: int, stages: int) -> range:
    """The layers of one stage: contiguous, and as even as can be.

    Raises:
        ValueError: there are more stages than layers.
    """
    if stages > n_layers:
        raise ValueError(f"{n_layers} layers cannot be cut into {stages} pipeline stages")
    return range(stage * n_layers // stages, (stage + 1) * n_layers // stages)


def cut(model: Llama, stage: int, stages: int) -> Llama:
    """Keep one pipeline stage of `model`, in place. What is left keeps its global names."""
    keep = layers_of_stage(model.config.n_layers, stage, stages)
    for name in list(model.layers):
        if int(name) not in keep:
            del model.layers[name]
    if stage > 0:
        model.tok_embeddings = None
    if stage < stages - 1:
        model.norm = model.output = None
    return model


def tensor_parallel_plan(model: Llama) -> dict[str, ParallelStyle]:
    """Megatron's plan with sequence parallelism: between the linears a rank holds a part of the sequence."""
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "layers.*.attention_norm": SequenceParallel(),
        "layers.*.attention": PrepareModuleInput(
            input_layouts=(Shard(1), None),  # None leaves the second input alone
            desired_input_layouts=(Replicate(), None),
        ),
        "layers.*.ffn_norm": SequenceParallel(),
        "layers.*.feed_forward": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "norm": SequenceParallel(),
        # Logits stay where they are computed, each rank with its part of the vocabulary: for `loss_parallel`.
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    dense = "feed_forward.shared" if model.config.n_experts else "feed_forward"
    for name in ("attention.wq", "attention.wk", "attention.wv", f"{dense}.w1", f"{dense}.w3"):
        plan[f"layers.*.{name}"] = ColwiseParallel()
    for name in ("attention.wo", f"{dense}.w2"):
        plan[f"layers.*.{name}"] = RowwiseParallel(output_layouts=Shard(1))
    return {path: style for path, style in plan.items() if getattr(model, path.split(".")[0]) is not None}


def build_stage(
    config: LlamaConfig,
    lora: LoRAConfig | None,
    mesh: DeviceMesh,
    stage: int,
    stages: int,
    *,
    length: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: str = "none",
    rewrite: bool = True,
    seed: int = 0,
    draw_on: torch.device | str = "cpu",
    exchange: bool = False,
) -> Llama:
    """This rank's shards of one pipeline stage, with adapters, compiled, and filled with the initial values of `seed`.

    Args:
        config: the size of the whole model.
        lora: the adapters of the whole model; None leaves it as it is, and frozen.
        mesh: of all ranks, see `Degrees.mesh`.
        stage: which stage.
        stages: of how many.
        length: tokens of a whole sequence.
        device: where to compute.
        dtype: of the parameters.
        compiled: "none", "block" (each block by itself) or "stage" (all in one, with breaks where FSDP gathers).
        rewrite: False compiles adapters as they stand.
        seed: of the initial values, which do not depend on the mesh.
        draw_on: where weights are drawn: a CPU and a GPU draw different ones from one seed.
        exchange: see `MixtureOfExperts.exchange`.
    """
    model = lay_out_stage(
        config,
        lora,
        mesh,
        stage,
        stages,
        device=device,
        dtype=dtype,
        compiled=compiled,
        rewrite=rewrite,
        exchange=exchange,
    )
    model.to_empty(device=device)
    initialise(model, seed, draw_on)
    cp = mesh["cp"]
    rope = rope_table(config.head_dim, length, config.rope_theta).to(device)
    model.rope = shard_sequence(cp, rope, 0) if cp.size() > 1 and device.type == "cpu" else rope
    return model


def lay_out_stage(
    config: LlamaConfig,
    lora: LoRAConfig | None,
    mesh: DeviceMesh,
    stage: int,
    stages: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: str = "none",
    rewrite: bool = True,
    exchange: bool = False,
) -> Llama:
    """As `build_stage`, on the meta device still: parameters have shapes and placements, and no values."""
    with torch.device("meta"):
        model = Llama(config, dtype)
    if lora is not None:
        with torch.device("meta"):
            lora_fx.install(model, lora)
    cut(model, stage, stages)
    if mesh["tp"].size() > 1:
        parallelize_module(model, mesh["tp"], tensor_parallel_plan(model))
    if lora is None:
        model.requires_grad_(False)
        if model.tok_embeddings is not None:
            # Gradients flow as if something before the first block were trained: every block has a backward pass.
            # (A copy, since what a collective has yet to bring is a tensor of another class, which loses them.)
            model.tok_embeddings.register_forward_hook(lambda _module, _inputs, x: x.detach().clone().requires_grad_())
    elif lora_fx.is_installed(model):
        lora_fx.freeze(model)  # again: sequence parallelism made the norms anew
    cp = mesh["cp"]
    if cp.size() > 1:
        for module in model.modules():
            if isinstance(module, Attention):
                module.attend = attention_over(cp, device)
    experts = shard_experts(model, mesh, exchange=exchange)
    compile_parts(model, compiled, rewrite)
    # Context-parallel ranks hold the same parameters and other tokens, as data-parallel ones do.
    names = tuple(name for name in mesh.mesh_dim_names or () if name in ("dp", "dp_outer", "ep", "cp"))
    data = mesh[names]._flatten("dp_cp")
    if data.size() > 1:
        # Adapters and their optimizer's state are small: whole on every rank they need no collective in each block, and
        # one all-reduce before the step (`average_gradients`). Sharded like all else they work, too.
        adapters = set(lora_fx.adapter_parameters(model)) if lora_fx.is_installed(model) else set()
        for layer in model.layers.values():
            fully_shard(layer, mesh=data, ignored_params=experts | adapters)
        fully_shard(model, mesh=data, ignored_params=experts | adapters)
    return model


def shard_experts(model: Llama, mesh: DeviceMesh, *, exchange: bool = False) -> set[nn.Parameter]:
    """Give each rank its part of every mixture: some experts (expert parallel), some channels (tensor parallel).

    Adapters follow their weights.

    Returns:
        The parameters that expert-parallel ranks hold between them, which FSDP must leave alone.

    Raises:
        ValueError: the model has no experts, or experts or channels that are not a multiple of the ranks.
    """
    ranks = mesh["ep"] if "ep" in (mesh.mesh_dim_names or ()) else None
    parts = mesh["tp"] if mesh["tp"].size() > 1 else None
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if ranks is not None and (not mixtures or model.config.n_experts % ranks.size()):
        raise ValueError(f"{model.config.n_experts} experts cannot be shared by {ranks.size()} expert-parallel ranks")
    if mixtures and parts is not None and model.config.ffn_dim % parts.size():
        raise ValueError(f"{model.config.ffn_dim} channels cannot be shared by {parts.size()} tensor-parallel ranks")
    names = [name for name, there in (("ep", ranks), ("tp", parts)) if there is not None]
    if not names:
        return set()
    for module in mixtures:
        module.ranks, module.parts, module.exchange = ranks, parts, exchange
        for name, channels in (("w1", 1), ("w2", 2), ("w3", 1)):
            weight = getattr(module.experts, name)
            placements = [Shard(0) if dim == "ep" else Shard(channels) for dim in names]
            sharded = distribute_tensor(weight, mesh[tuple(names)], placements)
            setattr(module.experts, name, nn.Parameter(sharded, requires_grad=weight.requires_grad))
    return set() if ranks is None else {p for module in mixtures for p in module.experts.parameters()}


def compile_parts(model: Llama, compiled: str, rewrite: bool = True) -> None:
    """Compile in place what has adapters with `lora_fx` if `rewrite` says so, and the rest as it is."""
    parts: dict[str, list[nn.Module]] = {"none": [], "block": list(model.layers.values()), "stage": [model]}
    for part in parts[compiled]:
        if rewrite and lora_fx.is_installed(part):
            lora_fx.compile(part, strict=True)  # a branch that is left as it was is an error
        else:
            part.compile()


@torch.no_grad()
def initialise(model: Llama, seed: int, draw_on: torch.device | str = "cpu") -> None:
    """Give a stage the initial values that the whole model has for this seed, one layer at a time.

    Every part is drawn from a seed of its own, whole and on one device, and then cut: neither the mesh nor the stages
    that a rank holds have a say. Adapters are drawn where they live.
    """
    parameters = dict(model.named_parameters())
    parts = [name for name in ("tok_embeddings", "norm", "output") if getattr(model, name) is not None]
    for part in [*parts, *(f"layers.{name}" for name in model.layers)]:
        with torch.device("meta"):
            alone = Llama(model.config)
        for name in list(alone.layers):
            if part != f"layers.{name}":
                del alone.layers[name]
        for name in ("tok_embeddings", "norm", "output"):
            if part != name:
                setattr(alone, name, None)
        alone.to_empty(device=draw_on)
        torch.manual_seed(part_seed(seed, part))
        alone.init_weights()
        for name, value in alone.named_parameters():
            fill(parameters[name], value.to(parameters[name].device))
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            torch.manual_seed(part_seed(seed, path))
            module.reset_adapters()


def part_seed(seed: int, name: str) -> int:
    """A seed for what is called `name`."""
    return seed + zlib.crc32(name.encode())
