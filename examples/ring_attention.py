"""Context parallelism: each rank holds a part of every sequence, and keys and values go round.

On CUDA that is torch's `context_parallel`. It has no CPU form, but the ring that it is made of takes any attention
operator: here the CPU's flash attention, so that the same algorithm runs in tests and on machines without a GPU.

    attention.attend = attention_over(mesh, device)      # of every block
    with sequences_over(mesh, device, [model.rope]) as part:
        loss = loss_of(model(part(inputs)), part(targets)); loss.backward()

What this file reads of torch beyond its public interface was checked on torch 2.11 and 2.13.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer

aten = torch.ops.aten
SEQUENCE = 2  # its dimension in [B, H, S, E]


# Operators, so that a compiled block stays one graph: the ring waits for its neighbours between products, which is
# nothing that a compiler could look into.
@torch.library.custom_op("lora_fx_examples::ring_attention", mutates_args=())
def _ring(q: Tensor, k: Tensor, v: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, E] and logarithms of the sums of exponentials [B, H, S]."""
    attend = cast(Any, aten._scaled_dot_product_flash_attention_for_cpu)
    out, logsumexp, *_ = ring._templated_ring_attention(
        _resolve_process_group(cast(Any, group)), SEQUENCE, attend, q, k, v, is_causal=True
    )
    return out.to(q.dtype).contiguous(), logsumexp.contiguous()


@_ring.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("lora_fx_examples::ring_attention_backward", mutates_args=())
def _ring_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    attend = cast(Any, _attend_backward)
    # Copies, since the last two are parts of one buffer of messages, and outputs of an operator may not overlap.
    gradients = ring._templated_ring_attention_backward(
        _resolve_process_group(cast(Any, group)),
        SEQUENCE,
        attend,
        grad,
        "grad_out",
        q,
        k,
        v,
        out,
        logsumexp,
        is_causal=True,
    )
    grad_q, grad_k, grad_v = (g.to(q.dtype, copy=True).contiguous() for g in gradients[:3])
    return grad_q, grad_k, grad_v


@_ring_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return grad_q, grad_k, grad_v


def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool, grad_out: Tensor
) -> tuple[Tensor, ...]:
    """The CPU's backward operator with arguments by name, as the ring passes them."""
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return cast(tuple[Tensor, ...], backward(grad_out, query, key, value, out, logsumexp, 0.0, is_causal))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, ctx.group = inputs
    ctx.save_for_backward(*qkv, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*_ring_backward(grad.contiguous(), *ctx.saved_tensors, ctx.group), None)


_ring.register_autograd(_backward, setup_context=_save)


def attention_over(mesh: DeviceMesh, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention over sequences that ranks share, in the form of `llama3.model.causal_attention`.

    Args:
        mesh: the context-parallel ranks, of one dimension.
        device: of this rank. On CUDA it is torch's own attention, which `sequences_over` replaces by the ring.
    """
    group = mesh.get_group().group_name

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The ring's operators have no grouped heads; on CUDA torch would take one that the ring has no form of.
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if device.type == "cuda":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out, _ = _ring(q.contiguous(), k.contiguous(), v.contiguous(), group)
        return out

    return attend


@contextlib.contextmanager
def sequences_over(
    mesh: DeviceMesh, device: torch.device, tables: Sequence[Tensor]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within it, forward and backward passes are over this rank's part of each sequence.

    Args:
        mesh: the context-parallel ranks, of one dimension.
        device: of this rank.
        tables: with one row a position, for `attention_over` on CUDA, where they are cut while this lasts.

    Yields:
        What cuts this rank's part out of a batch [B, S], which on CUDA it writes over.
    """
    if device.type != "cuda":
        yield lambda batch: shard_sequence(mesh, batch, 1)
        return
    with contextlib.ExitStack() as stack:

        def part(batch: Tensor) -> Tensor:
            # It cuts buffers in place, so they are cut as they are handed out.
            cut = context_parallel(mesh, buffers=[batch], buffer_seq_dims=[1], no_restore_buffers={batch})
            stack.enter_context(cut)
            return batch

        buffers = list(tables)
        stack.enter_context(context_parallel(mesh, buffers=buffers, buffer_seq_dims=[0] * len(buffers)))
        yield part


def shard_sequence(mesh: DeviceMesh, tensor: Tensor, dim: int) -> Tensor:
    """This rank's part of a sequence: the n-th piece from its head and the n-th from its tail, so that work is even.

    Args:
        mesh: the context-parallel ranks.
        tensor: the same on all of them.
        dim: the dimension of the sequence, a multiple of twice the number of ranks long.

    Raises:
        ValueError: the sequence cannot be cut evenly.
    """
    length = tensor.shape[dim]
    if length % (2 * mesh.size()):
        raise ValueError(f"a sequence of {length} tokens cannot be cut into {2 * mesh.size()} even pieces")
    balancer = _HeadTailLoadBalancer(length, mesh.size(), tensor.device)
    (part,) = ring._context_parallel_shard(mesh, [tensor], [dim], load_balancer=balancer)
    return cast(Tensor, part)
