"""The rewrites of experts' branches: grouped products in bfloat16, and experts that are multiplied one by one."""

# mypy: no-check-untyped-defs

import dataclasses

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx._torch import annotate
from lora_fx.passes.graph import PARAMETER
from tests.passes.harness import Case, adapt, by_graphs, by_kernels, capture, check_case

bf16 = torch.bfloat16
ENDS = (7, 7, 40, 64)  # the second expert gets nothing


def rows(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """What `grouped_mm` computes, expert by expert."""
    expert = (torch.arange(len(x), device=x.device) >= ends[:, None]).sum(0)
    return torch.stack([torch.where((expert == e)[:, None], F.linear(x, one), 0.0) for e, one in enumerate(w)]).sum(0)


class Stack(nn.Module):
    """One stack [E, N, K] over rows that are sorted already."""

    ends: Tensor

    def __init__(self, n: int = 48, k: int = 32, dtype: torch.dtype = bf16, ends: tuple[int, ...] = ENDS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter((torch.randn(len(ends), n, k) / k**0.5).to(dtype))
        self.register_buffer("ends", torch.tensor(ends, dtype=torch.int32))

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        ends = self.ends_for(x)
        return F.grouped_mm(x, w.transpose(-2, -1), offs=ends) if x.dtype == bf16 else rows(x, w, ends)

    def ends_for(self, x: Tensor) -> Tensor:
        return self.ends

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.w)


class Growing(Stack):
    """Whose experts share any number of rows alike."""

    def ends_for(self, x: Tensor) -> Tensor:
        return self.ends * (len(x) // 8)


class SwiGLU(Stack):
    """What a mixture's experts are."""

    def __init__(
        self, dtype: torch.dtype = bf16, ends: tuple[int, ...] = ENDS, width: int = 32, hidden: int = 96
    ) -> None:
        super().__init__(hidden, width, dtype, ends)
        self.w3 = nn.Parameter((torch.randn(len(ends), hidden, width) / width**0.5).to(dtype))
        self.w2 = nn.Parameter((torch.randn(len(ends), width, hidden) / hidden**0.5).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(F.silu(self.product(x, self.w)) * self.product(x, self.w3), self.w2)


def adapted(module: nn.Module, *names: str, rank: int = 8, **config) -> nn.Module:
    config.setdefault("alpha", 1.5 * rank)
    return adapt(module, std=0.2, rank=rank, target_modules=(), target_parameters=names or "w", **config)


def case(name, build, sites=1, **values) -> Case:
    values.setdefault("shape", (64, 32))
    values.setdefault("dtype", bf16)
    values.setdefault("seeds", 4)
    return Case(name, build, sites, **values)


def is_known_to_have_gaps() -> bool:
    """Whether torch says in a graph that rows of 44 elements are 48 apart, as they are; 2.13 does not."""
    with FakeTensorMode():
        x, w = torch.empty(64, 32, dtype=bf16), torch.empty(4, 44, 32, dtype=bf16).mT
        return not F.grouped_mm(x, w, offs=torch.empty(4, dtype=torch.int32)).is_contiguous()


WRITTEN = {"scale": 1, "accumulate": 1}
CASES = [
    case("training", lambda: adapted(Stack()), forward=WRITTEN, backward={"scale": 1, "pair": 1, "accumulate": 1}),
    case("first layer", lambda: adapted(Stack()), forward=WRITTEN, backward={"scale": 1, "pair": 1}, x_grad=False),
    case("inference", lambda: adapted(Stack()), forward=WRITTEN, grad=torch.no_grad),
    case(
        "a rank that is padded",
        lambda: adapted(Stack(), rank=3),
        forward=WRITTEN,
        backward={"scale": 1, "pair": 1, "accumulate": 1},
    ),
    case(
        "a dynamic number of rows",
        lambda: adapted(Growing(ends=(2, 2, 5, 8))),
        forward=WRITTEN,
        backward={"scale": 1, "pair": 1, "accumulate": 1},
        shapes=((16, 32), (24, 32)),
        dynamic=True,
    ),
    case(
        "rows with gaps between them",
        lambda: adapted(Stack(n=44)),
        forward={"scale": 1} if is_known_to_have_gaps() else WRITTEN,
        grad=torch.no_grad,  # of which torch has no gradient
    ),
    case(
        "swiglu",
        lambda: adapted(SwiGLU(), "w", "w2", "w3"),
        3,
        forward={"scale": 3, "recompute": 2, "recompute x": 1, "accumulate": 1},
        backward={"scale": 3, "pair": 3},
    ),
    case(
        "checkpointing",
        lambda: adapted(SwiGLU(), "w", "w2", "w3"),
        3,
        forward={"scale": 3, "accumulate": 1},
        backward={"scale": 3, "pair": 3},
        wrap=lambda m: lambda x: checkpoint(m, x, use_reentrant=False),
    ),
    case(
        "one by one",
        lambda: adapted(SwiGLU(torch.float32), "w", "w2", "w3"),
        12,
        forward={"scale": 12, "stack(8)": 8, "stack(4)": 4},
        backward={"scale": 12, "stack(8)": 8, "stack(4)": 4, "pair": 12},
        dtype=torch.float32,
    ),
]


@pytest.mark.parametrize(
    "one", [pytest.param(one, marks=[] if one.name == "training" else pytest.mark.slow) for one in CASES], ids=str
)
def test_rewritten_and_as_accurate_as_plain(one):
    check_case(one)


@pytest.mark.slow
def test_compiled_by_inductor():
    check_case(next(one for one in CASES if one.name == "swiglu"), by_kernels)


class TestGraph(expecttest.TestCase):
    def test_training(self) -> None:
        x = torch.randn(64, 32, dtype=bf16, requires_grad=True)
        self.assertExpectedInline(
            capture(adapted(Stack()), x).rewrite.after,
            """\
%0 = input                                                    bf16[4, 8, 32]
%1 = input                                                    bf16[4, 48, 8]
%2 = input                                                    f32[1]
%3 = input                                                    f32[1]
%4 = input                                                    bf16[4, 48, 32]
%5 = input                                                    i32[4]
%6 = input                                                    bf16[64, 32]
| %7 = tangent                                                bf16[64, 48]
%8 = select(%2, 0, 0)                                         f32[]
%9 = select(%3, 0, 0)                                         f32[]
%10 = mul(%8, %9)                                             f32[]
%11 = permute(%4, [0, 2, 1])                                  bf16[4, 32, 48]
%12 = permute(%0, [0, 2, 1])                                  bf16[4, 32, 8]
%13 = permute(%1, [0, 2, 1])                                  bf16[4, 8, 48]
%14 = _grouped_mm(%6, %11, %5)                                bf16[64, 48]
%15 = _grouped_mm(%6, %12, %5)                                bf16[64, 8]
%16 = lora_fx.grouped_accumulate(%14, %15, %13, %5, %10)      bf16[64, 48]
| %17 = permute(%13, [0, 2, 1])                               bf16[4, 48, 8]
| %18 = lora_fx.grouped_gradient_pair(%7, %17, %15, %5, %10)  (bf16[64, 8], bf16[4, 48, 8])
| %19 = getitem(%18, 1)                                       bf16[4, 48, 8]
| %20 = permute(%19, [0, 2, 1])                               bf16[4, 8, 48]
| %21 = getitem(%18, 0)                                       bf16[64, 8]
| %22 = permute(%21, [1, 0])                                  bf16[8, 64]
| %23 = _grouped_mm(%22, %6, %5)                              bf16[4, 8, 32]
| %24 = permute(%23, [0, 2, 1])                               bf16[4, 32, 8]
| %25 = permute(%12, [0, 2, 1])                               bf16[4, 8, 32]
| %26 = permute(%11, [0, 2, 1])                               bf16[4, 48, 32]
| %27 = _grouped_mm(%7, %26, %5)                              bf16[64, 32]
| %28 = lora_fx.grouped_accumulate(%27, %21, %25, %5)         bf16[64, 32]
| %29 = permute(%20, [0, 2, 1])                               bf16[4, 48, 8]
| %30 = permute(%24, [0, 2, 1])                               bf16[4, 8, 32]
return %16, %30, %29, None, None, None, None, %28""",
        )

    def test_report(self) -> None:
        block = nn.ModuleDict({"experts": adapted(SwiGLU(), "w", "w2", "w3")})
        x = torch.randn(64, 32, dtype=bf16, requires_grad=True)
        report = lora_fx.explain(block["experts"], x)
        assert report.rewritten == len(report.sites) == 3
        self.assertExpectedInline(
            str(report),
            """\
LoRA rewrite: 3 of 3 branches in 1 graph

module  in -> out  rank  forward                         backward
------  ---------  ----  ------------------------------  -----------
w       32 -> 96   8     scale, recompute                scale, pair
w3      32 -> 96   8     scale, recompute                scale, pair
w2      96 -> 32   8     scale, accumulate, recompute x  scale, pair

saved for backward: 0.0 MiB -> 0.0 MiB (-31%)""",
        )

    def test_report_of_experts_one_by_one(self) -> None:
        report = lora_fx.explain(adapted(SwiGLU(torch.float32), "w2"), torch.randn(64, 32))
        self.assertExpectedInline(
            str(report),
            """\
LoRA rewrite: 4 of 4 branches in 1 graph

module   in -> out  rank  forward          backward
-------  ---------  ----  ---------------  ---------------------
w2 (x4)  96 -> 32   8     scale, stack(4)  scale, stack(4), pair

saved for backward: 0.0 MiB -> 0.0 MiB (+0%)""",
        )


@pytest.mark.slow
def test_autograd_keeps_what_it_keeps_of_the_frozen_model_and_the_small_activations():
    one = next(one for one in CASES if one.name == "swiglu")
    frozen = SwiGLU()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    plain, _ = by_graphs(dataclasses.replace(one, seeds=1), frozen, rewrite=False)
    ours, _ = by_graphs(dataclasses.replace(one, seeds=1), one.build(), rewrite=True)
    theirs, _ = by_graphs(dataclasses.replace(one, seeds=1), one.build(), rewrite=False)
    small = 3 * 64 * 8 * 2  # three times h, in bfloat16
    assert ours.saved <= plain.saved + small
    assert theirs.saved > plain.saved + small


class Form(nn.Module):
    """A hand-written branch; `how` combines x, the frozen weight, the factors and the ends of two groupings."""

    def __init__(self, how, trained=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.w = nn.Parameter(torch.randn(4, 48, 32, dtype=bf16), requires_grad=trained)
        self.a = nn.Parameter(torch.randn(4, 8, 32, dtype=bf16))
        self.b = nn.Parameter(torch.randn(4, 48, 8, dtype=bf16))
        self.register_buffer("ends", torch.tensor(ENDS, dtype=torch.int32))
        self.register_buffer("other", torch.tensor((4, 8, 12, 64), dtype=torch.int32))

    def forward(self, x: Tensor):
        return self.how(self, x)


def mul(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, w.mT, offs=ends)


def branch(m, x):
    return mul(mul(x, m.a, m.ends), m.b, m.ends)


def returns_h(m, x):
    h = mul(x, m.a, m.ends)
    return mul(x, m.w, m.ends) + mul(h, m.b, m.ends) * 2.0, h


def test_a_branch_written_by_hand_is_found():
    x = torch.randn(64, 32, dtype=bf16, requires_grad=True)
    captured = capture(Form(lambda m, x: mul(x, m.w, m.ends) + branch(m, x) * 2.0), x)
    assert captured.count("forward") == {"scale": 1, "accumulate": 1}
    assert captured.count("backward") == {"scale": 1, "pair": 1, "accumulate": 1}
    captured = capture(Form(lambda m, x: mul(x, m.w, m.ends) + branch(m, x)), x)
    assert captured.count("backward") == {"pair": 1, "accumulate": 1}


def test_stacks_that_are_viewed_as_what_they_are():
    """As DTensor's `to_local` leaves this rank's experts in a graph."""
    x = torch.randn(64, 32, dtype=bf16, requires_grad=True)

    def whole(t: Tensor) -> Tensor:
        return t.view(t.shape)

    def viewed(m, x):
        h = mul(x, whole(m.a), m.ends)
        return mul(x, whole(m.w), m.ends) + mul(h, whole(m.b), m.ends) * 2.0

    captured = capture(Form(viewed), x)
    assert captured.count("forward") == {"scale": 1, "accumulate": 1}
    assert captured.count("backward") == {"scale": 1, "pair": 1, "accumulate": 1}


def test_computed_factors_of_what_is_known_for_a_branch():
    def noted(m, x):
        with annotate({PARAMETER: "w"}):
            h = mul(x, m.a.exp(), m.ends)
            return mul(x, m.w, m.ends) + mul(h, m.b, m.ends)

    captured = capture(Form(noted), torch.randn(64, 32, dtype=bf16, requires_grad=True))
    assert captured.rewrite.after == captured.rewrite.before
    assert captured.reasons == ["its factors are no inputs of the graph"]


ALONE = {
    "h is returned": (returns_h, "activations are returned to the caller"),
    "another grouping": (lambda m, x: mul(x, m.w, m.other) + branch(m, x), "groups its rows in another way"),
    "another input": (lambda m, x: mul(x.relu(), m.w, m.ends) + branch(m, x), "not a grouped product of the same"),
    "no base": (lambda m, x: x.repeat(1, 2)[:, :48] + branch(m, x), "not a grouped product of the same input"),
    "no sum": (lambda m, x: branch(m, x).relu(), "not into a sum with the base"),
    "a computed weight": (lambda m, x: mul(x, m.w * 2, m.ends) + branch(m, x), "not a product with a parameter"),
    "two groupings in the branch": (
        lambda m, x: mul(x, m.w, m.ends) + mul(mul(x, m.a, m.ends), m.b, m.other),
        None,
    ),
    "a computed factor": (lambda m, x: mul(x, m.w, m.ends) + mul(mul(x, m.a.exp(), m.ends), m.b, m.ends), None),
}


@pytest.mark.parametrize(("how", "reason"), ALONE.values(), ids=ALONE)
def test_what_is_no_branch_is_left_alone(how, reason):
    captured = capture(Form(how), torch.randn(64, 32, dtype=bf16, requires_grad=True))
    assert captured.rewrite.after == captured.rewrite.before
    assert len(captured.reasons) == (reason is not None)
    assert reason is None or reason in captured.reasons[0]


def test_a_trained_weight_and_a_large_rank_are_left_alone():
    x = torch.randn(64, 32, dtype=bf16, requires_grad=True)
    captured = capture(Form(lambda m, x: mul(x, m.w, m.ends) + branch(m, x) * 2.0, trained=True), x)
    assert captured.rewrite.after == captured.rewrite.before
    assert captured.reasons == ["its base weight is trained as well"]
    captured = capture(adapted(Stack(), rank=24), x)
    assert captured.reasons == ["rank 24 is more than half of min(32, 48): merging costs less"]


def test_a_frozen_factor_has_its_scale_folded():
    module = adapted(Stack())
    module.w_lora_b.requires_grad_(False)
    captured = capture(module, torch.randn(64, 32, dtype=bf16, requires_grad=True))
    assert captured.count("forward") == {"scale": 1, "accumulate": 1}
    assert captured.count("backward") == {"scale": 1, "accumulate": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_in_every_precision(dtype):
    """Against the formula; an expert may get no row, and there may be rows of nobody."""
    ops = torch.ops.lora_fx
    a, b = torch.randn(12, 4, dtype=dtype), torch.randn(3, 4, 24, dtype=dtype)
    base, dy, scale = torch.randn(12, 24, dtype=dtype), torch.randn(12, 24, dtype=dtype), torch.tensor(0.3)
    ends = torch.tensor([5, 5, 10], dtype=torch.int32)
    expected = torch.cat([a[:5] @ b[0], a[5:10] @ b[2], torch.zeros(2, 24, dtype=dtype)]) * scale
    torch.testing.assert_close(ops.grouped_scaled_mm(a, b, ends, scale), expected)
    torch.testing.assert_close(ops.grouped_accumulate(base, a, b, ends, scale), base + expected)
    out = base.clone()
    ops.grouped_accumulate_(out, a, b, ends, scale)
    torch.testing.assert_close(out, base + expected)
    grad_h, grad_b = ops.grouped_gradient_pair(dy, b.mT, a, ends, scale)
    torch.testing.assert_close(grad_h[:10], torch.cat([dy[:5] @ b[0].T, dy[5:10] @ b[2].T]) * scale)
    zero = torch.zeros(24, 4, dtype=dtype)
    torch.testing.assert_close(grad_b, torch.stack([dy[:5].T @ a[:5], zero, dy[5:10].T @ a[5:10]]) * scale)
    for name, arguments in (
        ("grouped_scaled_mm", (a, b, ends, scale)),
        ("grouped_accumulate", (base, a, b, ends, scale)),
        ("grouped_gradient_pair", (dy, b.mT, a, ends, scale)),
    ):
        torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=("test_schema", "test_faketensor"))
