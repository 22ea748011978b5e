"""Async tensor parallelism on a GPU: values that programs read and write lie in the order that collectives need."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.passes import row_order
from tests.distributed.simulated import fake_world
from tests.distributed.test_graphs import share_tokens
from tests.passes import fake_gpu
from tests.passes.harness import adapt
from tests.passes.interpreter import INTERPRETED
from tests.passes.modules import Mlp
from tests.passes.test_async_tensor_parallel import pipelining

pytestmark = [pytest.mark.distributed]

TOKENS, WIDTH, HIDDEN = (4, 512), 512, 2048


class Streams(nn.Module):
    """Two gated MLPs behind norms, each of which adds to a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.RMSNorm(WIDTH), "mlp": Mlp(WIDTH, HIDDEN)}) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["mlp"](layer["norm"](x))
        return x


def streams(adapted: bool) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = adapt(Streams(), rank=16) if adapted else Streams()
    share_tokens(model, {f"layers.{i}.mlp": f"layers.{i}.norm" for i in range(2)})
    return (lora_fx.freeze(model) if adapted else model.requires_grad_(False)).bfloat16()


def codes(adapted: bool) -> list[str]:
    """What Inductor writes for the two halves."""
    torch._dynamo.reset()
    x = torch.randn(*TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with fake_world(2), pipelining(), fake_gpu.recorded() as (found, backend):
        fake_gpu.train(streams(adapted), backend, x)
    assert len(found.codes) == 2
    return found.codes


def copies(code: str) -> Counter[int]:
    """Elements of the large values that Inductor's pointwise kernels write by themselves."""
    found = re.findall(r"triton_poi_fused\w*\.run\(.*?, (\d+), stream=", code)
    return Counter(size for size in map(int, found) if size >= TOKENS[0] * TOKENS[1] * WIDTH)


@pytest.mark.skipif(INTERPRETED, reason="compiles for a GPU")
def test_no_value_is_copied_that_is_not_in_the_frozen_model():
    """Neither is what is gathered, nor what is scattered, nor a gradient between a product and a program."""
    frozen, ours = codes(False), codes(True)
    for theirs, mine in zip(frozen, ours, strict=True):
        assert copies(mine) - copies(theirs) == {}, (copies(mine), copies(theirs))
        for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
            assert mine.count(f"torch.ops.symm_mem.{name}.default(") == theirs.count(
                f"torch.ops.symm_mem.{name}.default("
            )
    forward, backward = ours
    assert "return_A=True" not in forward + backward
    # The output of SwiGLU, of this rank's features, as what multiplies and scatters it wants it.
    sequences, length, columns = TOKENS[0], 2 * TOKENS[1], HIDDEN // 2
    written = f"({sequences}, {length}, {columns}), ({columns}, {sequences * columns}, 1), 0)"
    launches = [line for line in forward.splitlines() if "lora_fx_2load_2product_1store" in line and ".run(" in line]
    assert len(launches) == 2 and all(written in line for line in launches)


def test_nothing_is_done_where_no_order_is_asked_for():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.neg.default, (x,)))
    before = [*graph.nodes]
    assert [*row_order.settle(graph)] == [] and [*graph.nodes] == before


def test_an_order_that_no_program_can_write_stays():
    """Strides with gaps, or of what no program makes."""
    from torch._inductor import inductor_prims

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    value: Any = graph.call_function(torch.ops.aten.neg.default, (x,))
    order = graph.call_function(inductor_prims.force_stride_order, (value, [4, 8, 1]))
    graph.output(order)
    assert [*row_order.settle(graph)] == [] and order.args == (value, [4, 8, 1])
