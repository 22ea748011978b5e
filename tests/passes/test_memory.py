"""Where the matrices of tile programs lie: what Inductor writes for them, and what they write over.

Compiled by Inductor for the CPU with the passes deciding as on a GPU (`tests/passes/on_gpu.py`).
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from tests.passes import on_gpu
from tests.passes.test_fuse_tiles import K, N, bf16, mlp, normed, x


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(module, options=on_gpu.options(), fullgraph=True)


def backward_code(module: nn.Module, value: Tensor) -> str:
    def step() -> None:
        compiled(module)(value).sum().backward()

    _, codes = run_and_get_code(step)
    assert len(codes) == 2
    return codes[1]


def matrices(code: str, rows: int, columns: int) -> int:
    """How many matrices of a size are allocated."""
    return len(re.findall(rf"empty_strided_cpu\(\({rows}, {columns}\)", code))


def test_backward_writes_over_what_forward_saved() -> None:
    """SwiGLU: of the gradients of gate and up, one takes the memory of dz, the other that of what was saved."""
    code = backward_code(mlp(), x())
    assert matrices(code, 160, N) == 1, "dz, the large product"
    (outputs,) = (match for match in re.findall(r"tile_\.default\(\[([^]]*)\]", code) if match.count(",") == 2)
    assert re.search(r"\bmm\w*\b", outputs), f"an input of the graph is among {outputs}"


def test_a_retained_graph_keeps_what_forward_saved() -> None:
    """What is read again is not written over, and the second gradients are the first."""
    module, value = mlp(), x()
    function = compiled(module)
    parameters = [p for p in module.parameters() if p.requires_grad]

    y = function(value)
    first = torch.autograd.grad(y, [value, *parameters], torch.ones_like(y), retain_graph=True)
    second = torch.autograd.grad(y, [value, *parameters], torch.ones_like(y))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))


def test_what_the_caller_has_is_not_written_over() -> None:
    """A gate that the model returns besides is saved, too, and is the caller's."""

    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(N, K).to(bf16) / 8 for _ in range(2)).requires_grad_(False)
            self.a = nn.ParameterList(torch.randn(4, K).to(bf16) / 8 for _ in range(2))
            self.b = nn.ParameterList(torch.randn(N, 4).to(bf16) / 8 for _ in range(2))

        def forward(self, value: Tensor) -> tuple[Tensor, ...]:
            bases = [value @ weight.t() for weight in self.weights]
            gate, up = (base + (value @ a.t()) @ b.t() for base, a, b in zip(bases, self.a, self.b))
            return nn.functional.silu(gate) * up, *bases

    module, value = Shown(), x()
    bases: list[Tensor] = []
    before: list[Tensor] = []

    def step() -> None:
        y, *bases[:] = compiled(module)(value)
        before[:] = [base.clone() for base in bases]
        y.sum().backward()

    _, codes = run_and_get_code(step)
    assert "tile_.default" in codes[1] and not re.search(r"tile_\.default\(\[[^]]*\bmm", codes[1])
    assert all(torch.equal(base, old) for base, old in zip(bases, before, strict=True))


def test_a_norm_that_programs_and_products_read_is_written_once() -> None:
    module, value = normed(), x()
    _, codes = run_and_get_code(compiled(module), value)
    sized = len(re.findall(rf"empty_strided_cpu\(\(2, 80, {K}\), \({80 * K}, {K}, 1\), torch.bfloat16\)", codes[0]))
    assert sized == 1 and matrices(codes[0], 160, K) == 3, "the norm, and y of q, k and v"
