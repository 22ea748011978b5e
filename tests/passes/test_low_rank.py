import itertools

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lora_fx.passes.low_rank import low_rank

M, K, N, R = 6, 10, 8, 3


def operands(dtype=torch.float32, adapter_dtype=None, leading=(M,)) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(*leading, K).to(dtype)
    return x, torch.randn(R, K).to(adapter_dtype), torch.randn(N, R).to(adapter_dtype)


@pytest.mark.parametrize("leading", [(), (M,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)])
def test_formula(leading, scale):
    x, a, b = operands(leading=leading)
    y = low_rank(x, a, b, scale)
    expected = 2.0 * (x.double() @ a.double().T) @ b.double().T
    assert y.shape == (*leading, N)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients():
    x, a, b = (t.double().requires_grad_() for t in operands())
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(low_rank, (x, a, b, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_activations_keep_their_dtype(dtype, adapter_dtype):
    x, a, b = operands(dtype, adapter_dtype)
    assert low_rank(x, a, b, torch.tensor(2.0)).dtype == dtype


def operations(*operands):
    graph = make_fx(lambda *args: low_rank(*args))(*operands).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_dtypes_add_no_cast_and_the_scale_is_not_read(dtype):
    products = ["aten.t.default", "aten.mm.default"] * 2
    assert operations(*operands(dtype), torch.tensor(2.0)) == [*products, "aten.mul.Tensor"]


def test_autocast_decides_as_for_linear():
    for dtypes in itertools.product([torch.bfloat16, torch.float32], repeat=2):
        x, a, b = operands(*dtypes)
        with torch.autocast("cpu", torch.bfloat16):
            y = low_rank(x, a, b, torch.tensor(2.0))
        assert y.dtype == torch.bfloat16
        expected = 2.0 * (x.double() @ a.double().T) @ b.double().T
        torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.3)


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    x, a, b = operands()
    plain = low_rank(x, a, b, 2.0)
    assert torch.equal(low_rank(x, a, b, 2.0, 0.5, False), plain)
    assert torch.equal(low_rank(x, a, b, 2.0, 0.0, True), plain)
    torch.manual_seed(0)
    dropped = torch.stack([low_rank(x, a, b, 2.0, 0.5, True) for _ in range(4000)])
    assert not torch.equal(dropped[0], plain)
    assert (dropped.mean(0) - plain).abs().max() < 6 * (dropped.std(0) / 4000**0.5).max()
