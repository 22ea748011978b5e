"""Regions beside rows that are gathered, and that data count."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.harness import adapt
from tests.passes.modules import Mlp
from tests.passes.on_gpu import capture, programs
from tests.passes.regions import K, N, bf16, compared


def test_values_that_are_gathered_beside_others() -> None:
    """One kernel computes of both, as of a bias for each token's expert."""

    class Biased(nn.Module):
        rows: Tensor
        biases: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp(K, N).to(bf16)
            self.register_buffer("rows", torch.randint(4, (160,)))
            self.register_buffer("biases", torch.randn(2, 4, N, dtype=bf16))

        def forward(self, x: Tensor) -> Tensor:
            gate, up = (w(x) + bias[self.rows] for w, bias in zip((self.mlp.gate, self.mlp.up), self.biases))
            down: Tensor = self.mlp.down(F.silu(gate) * up)
            return down

    captured = compared(lambda: adapt(Biased()), 3)
    bodies = [[statement[0] for statement in program.body] for program in programs(captured.forward[0].graph)]
    assert any(body.count("product") == 2 and {"store", "down"} <= {*body} for body in bodies)


def test_rows_that_data_count() -> None:
    """Whether a gradient that is expanded to them has their number is no question that a graph can be asked."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(K, K, bias=False, dtype=bf16)

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x[torch.nonzero(x[:, 0] > 0)[:, 0]]) * 0.5).sum(0, keepdim=True)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        captured = capture(adapt(Chosen()), torch.randn(160, K, dtype=bf16, requires_grad=True))
    assert all(programs(half[0].graph) for half in (captured.forward, captured.backward))
