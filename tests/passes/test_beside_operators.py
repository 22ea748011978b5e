"""The operators over weights and factors that lie together in memory (`lora_fx.passes.kernels.beside`): K = 48."""

import logging

import pytest
import torch
from torch import Tensor

from lora_fx.passes.kernels import beside, operators

bf16, f16 = torch.bfloat16, torch.float16
K, N, R = 48, 128, 8


# ---- y and h ---------------------------------------------------------------------------------------------------------


def operands(dtype: torch.dtype = bf16) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.randn(N + R, K, dtype=dtype)
    return torch.randn(20, K, dtype=dtype), both[:N], both[N:]


@pytest.mark.parametrize("dtype", [bf16, torch.float16, torch.float32])
def test_the_operator(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    given, weight, a = operands(dtype)
    assert beside.are_beside(weight, a)
    both = operators.stacked_mm(given, [weight, a])
    assert both.shape == (20, N + R) and both.stride() == (192, 1)
    exact = torch.cat([given.double() @ weight.double().t(), given.double() @ a.double().t()], 1)
    torch.testing.assert_close(both.double(), exact, rtol=2e-2, atol=2e-2)
    assert not caplog.messages
    torch.library.opcheck(operators.stacked_mm, (given, [weight, a]), test_utils=("test_schema", "test_faketensor"))


def test_the_operator_where_they_lie_apart(caplog: pytest.LogCaptureFixture) -> None:
    """The same values, and one line that says why it is slower."""
    given, weight, a = operands()
    beside._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lora_fx.passes"):
        for _ in range(2):
            torch.testing.assert_close(
                operators.stacked_mm(given, [weight.clone(), a.clone()]), operators.stacked_mm(given, [weight, a])
            )
    assert len(caplog.messages) == 1 and "before lora_fx.compile" in caplog.messages[0]


def test_the_operator_of_siblings(caplog: pytest.LogCaptureFixture) -> None:
    """Together, and where only each factor lies behind its weight, which nobody needs to hear of."""
    whole = torch.randn(2 * (N + R), K, dtype=bf16)
    together = list(whole.split([N, R, N, R]))
    apart = [part for half in (whole[: N + R].clone(), whole[N + R :].clone()) for part in half.split([N, R])]
    given = torch.randn(20, K, dtype=bf16)
    assert [len(beside._together(rows)) for rows in (together, apart)] == [1, 2]
    results = [operators.stacked_mm(given, rows) for rows in (together, apart)]
    assert results[0].shape == (20, 2 * (N + R)) and results[0].stride() == (320, 1)
    for result in results:
        torch.testing.assert_close(result, given @ whole.t(), rtol=2e-2, atol=2e-2)
    assert not caplog.messages


def test_one_factor_of_siblings_that_was_moved(caplog: pytest.LogCaptureFixture) -> None:
    given, whole = torch.randn(20, K, dtype=bf16), torch.randn(2 * (N + R), K, dtype=bf16)
    rows = list(whole.split([N, R, N, R]))
    rows[3] = rows[3].clone()
    beside._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lora_fx.passes"):
        result = operators.stacked_mm(given, rows)
    torch.testing.assert_close(result, given @ whole.t(), rtol=2e-2, atol=2e-2)
    assert len(caplog.messages) == 1


def test_an_address_that_others_have_by_now() -> None:
    """What was remembered by an address is of use to whatever lies there next."""
    memory = torch.randn(N + R, K, dtype=bf16)
    for _ in range(2):
        given = torch.randn(20, K, dtype=bf16)
        weight, a = (part.detach() for part in memory.split([N, R]))
        both = operators.stacked_mm(given, [weight, a])
        torch.testing.assert_close(both, torch.cat([given @ weight.t(), given @ a.t()], 1))
        # Another owner of the same place, as an allocator has them.
        memory = torch.from_dlpack(memory)
        memory.normal_()


@pytest.mark.parametrize("change", ["dtype", "gap", "order", "width"])
def test_what_lies_apart(change: str) -> None:
    _, weight, a = operands()
    both = torch.randn(N + R + 1, K, dtype=bf16)
    pairs = {
        "dtype": (weight, a.float()),
        "gap": (both[:N], both[N + 1 :]),
        "order": (both[R : N + R], both[:R]),
        "width": (weight, both[N:, : K // 2]),
    }
    assert not beside.are_beside(*pairs[change])


# ---- dX --------------------------------------------------------------------------------------------------------------

PARTS = (40, 8, 16, 8)


def matrices(dtype: torch.dtype = bf16) -> tuple[Tensor, list[Tensor], Tensor]:
    """[M, sum of N] with gaps, the rows that it is multiplied by, and all of those."""
    whole = torch.randn(sum(PARTS), K, dtype=dtype)
    wide = torch.zeros(20, 128, dtype=dtype)
    wide[:, : sum(PARTS)].normal_()
    return wide[:, : sum(PARTS)], list(whole.split(PARTS)), whole


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_one_product(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    both, rows, whole = matrices(dtype)
    assert len(beside._together(rows)) == 1
    result = operators.joined_mm(both, rows)
    torch.testing.assert_close(result.double(), both.double() @ whole.double(), rtol=2e-2, atol=2e-2)
    assert not caplog.messages
    torch.library.opcheck(operators.joined_mm, (both, rows), test_utils=("test_schema", "test_faketensor"))


def test_one_product_where_they_lie_apart(caplog: pytest.LogCaptureFixture) -> None:
    """Nearly the same values, each rounded more often, and one line that says why it is slower."""
    both, rows, whole = matrices()
    beside._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lora_fx.passes"):
        for _ in range(2):
            result = operators.joined_mm(both, [part.clone() for part in rows])
            torch.testing.assert_close(result.double(), both.double() @ whole.double(), rtol=5e-2, atol=2e-1)
    assert len(caplog.messages) == 1 and "before lora_fx.compile" in caplog.messages[0]


def test_side_by_side() -> None:
    parts = [torch.randn(20, n, dtype=bf16) for n in PARTS]
    room = operators.side_by_side(parts[::2], [0, 48], 128)
    assert room.shape == (20, 128)
    operators.put_(room, parts[1::2], [40, 64])
    assert torch.equal(room[:, : sum(PARTS)], torch.cat(parts, 1))
    with pytest.raises(ValueError, match="zip"):
        operators.put_(room, parts, [0])
    torch.library.opcheck(operators.put_, (room, parts[1::2], [40, 64]), test_utils=("test_schema", "test_faketensor"))
