"""The graph of one column-wise linear under sequence parallelism. See `tests/passes/test_sequence_parallel.py`."""

import re
from typing import Any

import expecttest
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.distributed.simulated import fake_world
from tests.passes.harness import adapt, capture

pytestmark = [pytest.mark.distributed]


@pytest.fixture(autouse=True)
def fresh() -> None:
    """What Dynamo has seen of the same code in other tests, with other sizes, would make sizes symbols here."""
    torch._dynamo.reset()


def without_meshes(text: str) -> str:
    """A printed graph without the meshes in it: whether they are inputs or attributes varies from run to run."""
    mesh = re.compile(r"(%\d+) = (?:input +FakeScriptObject|attribute _torchbind_obj\d+)")
    meshes = mesh.findall(text)
    lines = [line for line in text.splitlines() if not mesh.search(line)]
    names = [match.group() for line in lines[:-1] if (match := re.search(r"%\d+", line))]
    number = {name: f"%{place}" for place, name in enumerate(names)} | dict.fromkeys(meshes, "mesh")
    return "\n".join(re.sub(r"%\d+", lambda match: number[match.group()], " ".join(line.split())) for line in lines)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 has other views around it")
class TestOneLinear(expecttest.TestCase):
    def test_after(self) -> None:
        torch.manual_seed(0)
        with fake_world(2):
            model: Any = adapt(nn.ModuleDict({"up": nn.Linear(16, 12, bias=False)}), rank=2)
            plan = ColwiseParallel(input_layouts=Shard(0))
            parallelize_module(model["up"], init_device_mesh("cpu", (2,)), plan)
            x = torch.randn(3, 16, requires_grad=True)
            result = capture(lambda x: model["up"](x), x, backward=True)
        self.assertExpectedInline(
            without_meshes(result.rewrite.after),
            """\
%0 = input f32[3, 16]
%1 = input f32[6, 16]
%2 = input f32[]
%3 = input f32[]
%4 = input f32[2, 16]
%5 = input f32[6, 2]
| %6 = tangent f32[6, 6]
%7 = view(%0, [3, 16]) f32[3, 16]
%8 = permute(%1, [1, 0]) f32[16, 6]
%9 = mul(%2, %3) f32[]
%10 = permute(%4, [1, 0]) f32[16, 2]
%11 = mm(%0, %10) f32[3, 2]
%12 = _c10d_functional.all_gather_into_tensor_coalesced([%7, %11], 2, '0') (f32[6, 16], f32[6, 2])
%13 = getitem(%12, 0) f32[6, 16]
%14 = _c10d_functional.wait_tensor(%13) f32[6, 16]
%15 = mm(%14, %8) f32[6, 6]
%16 = getitem(%12, 1) f32[6, 2]
%17 = _c10d_functional.wait_tensor(%16) f32[6, 2]
%18 = permute(%5, [1, 0]) f32[2, 6]
%19 = lora_fx.accumulate(%15, %17, %18, %9) f32[6, 6]
%20 = view(%19, [6, 6]) f32[6, 6]
| %21 = view(%6, [6, 6]) f32[6, 6]
| %22 = permute(%18, [1, 0]) f32[6, 2]
| %23 = lora_fx.gradient_pair(%6, %22, %17, %9) (f32[6, 2], f32[6, 2])
| %24 = getitem(%23, 1) f32[6, 2]
| %25 = permute(%24, [1, 0]) f32[2, 6]
| %26 = getitem(%23, 0) f32[6, 2]
| %27 = permute(%25, [1, 0]) f32[6, 2]
| %28 = permute(%10, [1, 0]) f32[2, 16]
| %29 = permute(%8, [1, 0]) f32[6, 16]
| %30 = mm(%21, %29) f32[6, 16]
| %31 = _c10d_functional.reduce_scatter_tensor_coalesced([%30, %26], 'sum', 2, '0') (f32[3, 16], f32[3, 2])
| %32 = getitem(%31, 0) f32[3, 16]
| %33 = getitem(%31, 1) f32[3, 2]
| %34 = _c10d_functional.wait_tensor(%32) f32[3, 16]
| %35 = _c10d_functional.wait_tensor(%33) f32[3, 2]
| %36 = permute(%35, [1, 0]) f32[2, 3]
| %37 = mm(%36, %0) f32[2, 16]
| %38 = permute(%37, [1, 0]) f32[16, 2]
| %39 = permute(%38, [1, 0]) f32[2, 16]
| %40 = lora_fx.accumulate(%34, %35, %28) f32[3, 16]
return %20, %40, None, None, None, None, %39, mesh, %27, mesh""",
        )
