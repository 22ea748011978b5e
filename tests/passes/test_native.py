"""The CPU kernels of thin products: right for every shape and layout, chosen where they fit, absent without harm.

Each is compared with float64, and with what ATen makes of the same product: it may not be less accurate.
"""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lora_fx.passes._torch import compile_cpp
from lora_fx.passes.graph import MM
from lora_fx.passes.kernels import native, operators
from lora_fx.passes.site import MARK
from tests.passes.harness import Case, adapt, by_kernels, capture, check_case
from tests.passes.modules import QKV

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HAS_FASTER_PRODUCTS = native.has_faster_products.__wrapped__
ALLOWED, FLOOR = 1.1, 4 * 2.0**-24

pytestmark = pytest.mark.skipif(
    native.max_rank(torch.float32) == 0, reason="there are no kernels for this CPU, or there is no compiler"
)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is too small."""
    monkeypatch.setattr(native, "MIN_WORK", 0)


def layouts(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Tensor]:
    """One random matrix as rows, as a part of wider rows at an odd place, as columns, and with gaps in both."""
    values = torch.randn(rows, columns, generator=generator).to(dtype)
    yield values
    yield torch.cat([values[:, :1], values, values], 1)[:, 1 : columns + 1]
    yield values.t().contiguous().t()
    yield values.repeat_interleave(2, 1).repeat_interleave(2, 0)[::2, ::2]


def check(found: Tensor, *products: tuple[Tensor, Tensor], base: Tensor | None = None, scale: float) -> None:
    """`found` against base + scale * a @ b in float64, with ATen's error as the yardstick."""
    ((a, b),) = products
    exact = scale * (a.double() @ b.double()) + (0 if base is None else base.double())
    yardstick = torch.addmm(torch.zeros_like(found) if base is None else base, a, b, alpha=scale)
    size = exact.norm()
    ours, theirs = ((t.double() - exact).norm() / size for t in (found, yardstick))
    assert found.dtype == a.dtype and found.is_contiguous()
    assert ours <= ALLOWED * theirs + FLOOR, (a.shape, a.stride(), b.shape, b.stride(), float(ours), float(theirs))


def shapes(count: int, seed: int, most: int) -> Iterator[tuple[int, int, int]]:
    """M and N (or K), which no tile divides, and a rank of at most `most`."""
    draw = random.Random(seed)
    yield from ((1, 1, 1), (64, 64, 16), (129, 48, most), (131, 33, most - 1))
    for _ in range(count):
        yield (
            draw.randrange(1, 300),
            draw.choice([draw.randrange(1, 300), 8 * draw.randrange(1, 40)]),
            draw.randint(1, most),
        )


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_any_shape(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for m, n, r in shapes(30, seed=1, most=native.max_rank(dtype)):
        x, a = torch.randn(m, n, generator=generator).to(dtype), torch.randn(n, r, generator=generator).to(dtype)
        h, b = torch.randn(m, r, generator=generator).to(dtype), torch.randn(r, n, generator=generator).to(dtype)
        for left, right in ((x, a), (h, b), (h.t(), x), (x.t(), h)):
            found = native.scaled_mm(left, right, 0.7)
            assert found is not None
            check(found, (left, right), scale=0.7)
        base = x.clone()
        assert native.accumulate(base, h, b, -1.3)
        check(base, (h, b), base=x, scale=-1.3)
        pair = native.gradient_pair(x, a, h, 0.7)
        assert pair is not None
        check(pair[0], (x, a), scale=0.7)
        check(pair[1], (x.t(), h), scale=0.7)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_in_any_layout(dtype: torch.dtype) -> None:
    """The operators are right in all; the kernels take the large matrix where the numbers of a row are together."""
    generator, m, n, r = torch.Generator().manual_seed(0), 77, 139, 5
    scale, taken = torch.tensor(0.7), 0
    for x in layouts(m, n, dtype, generator):
        for a, h in zip(layouts(n, r, dtype, generator), layouts(m, r, dtype, generator), strict=True):
            together = x.stride(1) == 1
            assert (native.gradient_pair(x, a, h, 0.7) is not None) == together
            taken += together
            check(operators.scaled_mm(x, a, scale), (x, a), scale=0.7)
            check(operators.scaled_mm(h.t(), x, scale), (h.t(), x), scale=0.7)
            check(operators.scaled_mm(x.t(), h, scale), (x.t(), h), scale=0.7)
            check(operators.scaled_mm(h, a.t(), scale), (h, a.t()), scale=0.7)
            grad_h, grad_b = operators.gradient_pair(x, a, h, scale)
            check(grad_h.contiguous(), (x, a), scale=0.7)
            check(grad_b.contiguous(), (x.t(), h), scale=0.7)
            base = x.clone()  # keeps the layout where it has no gaps
            operators.accumulate_(base, h, a.t(), scale)
            check(base.contiguous(), (h, a.t()), base=x, scale=0.7)
    assert taken == 8


@pytest.mark.usefixtures("any_size")
def test_a_part_of_a_matrix_is_all_that_is_written() -> None:
    whole = torch.full((40, 60), 7.0)
    h, b = torch.randn(30, 3), torch.randn(3, 37)
    assert native.accumulate(whole[5:35, 11:48], h, b, 2.0)
    torch.testing.assert_close(whole[5:35, 11:48], 7 + 2 * (h @ b))
    whole[5:35, 11:48] = 7.0
    assert (whole == 7).all()


def test_what_is_left_to_aten() -> None:
    x, thin, wide = torch.randn(512, 512), torch.randn(512, 16), torch.randn(512, 512)
    assert native.scaled_mm(x, thin, 1.0) is not None
    assert native.scaled_mm(x, wide, 1.0) is None, "not thin"
    assert native.scaled_mm(x[:1], thin, 1.0) is None, "too small"
    assert native.scaled_mm(x.double(), thin.double(), 1.0) is None, "no kernel for the type"
    assert native.scaled_mm(thin[:, :1].expand(512, 512), thin, 1.0) is None, "one number in every place of a row"
    assert not native.accumulate(x.t(), thin, wide[:16], 1.0), "written by columns"
    assert not native.accumulate(x[:1].expand(512, 512), thin, wide[:16], 1.0), "rows that share memory"
    assert native.gradient_pair(x, wide, wide, 1.0) is None, "not thin"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal_to_the_bit(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    x, a, h = (torch.randn(shape).to(dtype) for shape in ((1003, 520), (520, 20), (1003, 20)))
    torch.set_num_threads(threads)
    try:
        runs = [(native.scaled_mm(x, a, 0.7), native.gradient_pair(x, a, h, 0.7)) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    (product, pair), *others = runs
    assert product is not None and pair is not None
    for other, others_pair in others:
        assert other is not None and others_pair is not None
        assert torch.equal(product, other) and all(map(torch.equal, pair, others_pair))
    check(product, (x, a), scale=0.7)
    check(pair[1], (x.t(), h), scale=0.7)


SETS = {
    "without bfloat16 units": ("-mno-avx512bf16",),
    "AVX2": ("-march=haswell", "-mno-avx512f"),
}


@pytest.mark.slow
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("flags", SETS.values(), ids=SETS)
def test_other_instruction_sets(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What older CPUs run, as far as this one can."""
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512")):
        pytest.skip("this CPU runs nothing older")
    native.max_rank.cache_clear()
    with torch._inductor.config.patch("cpp.simdlen", 256):
        built = native.declare(compile_cpp(native.SOURCE.read_text(), (*native.FLAGS, *flags)))
    monkeypatch.setattr(native, "library", lambda: built)
    try:
        for dtype in DTYPES:
            test_products_of_any_shape(dtype)
    finally:
        native.max_rank.cache_clear()


# ---- in graphs -------------------------------------------------------------------------------------------------------


def products(graph: GraphModule, target: object) -> list[Node]:
    return graph.graph.find_nodes(op="call_function", target=target)  # type: ignore[arg-type]


def sizes(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def inner(product: Node) -> int:
    left = product.args[0]
    assert isinstance(left, Node)
    return sizes(left)[1]


def test_the_lowering_chooses_them() -> None:
    """h and dA of one linear; y, g, dB and dX have operators already, and the base products stay what they are."""
    module = adapt(nn.Linear(256, 512, bias=False).bfloat16(), rank=8)
    captured = capture(module, torch.randn(2, 512, 256, dtype=torch.bfloat16, requires_grad=True), backward=True)
    (forward,), (backward,) = captured.forward, captured.backward
    (h,) = products(forward, operators.scaled_mm)
    (da,) = products(backward, operators.scaled_mm)
    assert sizes(h) == (1024, 8) and sizes(da) == (8, 256)
    assert [sizes(node) for node in products(forward, MM)] == [(1024, 512)]
    assert [sizes(node) for node in products(backward, MM)] == [(1024, 256)]
    assert len(products(backward, operators.gradient_pair)) == 1


def test_a_stack_is_one_product() -> None:
    module = adapt(QKV(256, 128).bfloat16(), rank=8)
    x = torch.randn(1024, 256, dtype=torch.bfloat16, requires_grad=True)
    captured = capture(lambda x: sum(y.sum() for y in module(x)), x, backward=True)
    (forward,), (backward,) = captured.forward, captured.backward
    assert [n for n in products(forward, MM) + products(backward, MM) if 24 in (*sizes(n), inner(n))] == []
    assert [sizes(n) for n in products(forward, operators.scaled_mm) if sizes(n)[1] == 24] == [(1024, 24)]
    # dA and the one term of dX.
    assert sorted(sizes(n) for n in products(backward, operators.scaled_mm)) == [(24, 256), (1024, 256)]


def test_what_the_lowering_leaves() -> None:
    """Small products, other people's products, and everything where there are no kernels."""
    small = adapt(nn.Linear(48, 96, bias=False), rank=4)
    (forward,) = capture(small, torch.randn(16, 48, requires_grad=True)).forward
    assert products(forward, operators.scaled_mm) == []

    class Bottleneck(nn.Module):
        """Two thin products that are no branch of a linear."""

        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(512, 8, bias=False), nn.Linear(8, 512, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    (forward,) = capture(Bottleneck(), torch.randn(1024, 512, requires_grad=True)).forward
    assert products(forward, operators.scaled_mm) == [] and len(products(forward, MM)) == 2


def test_double_precision_is_left() -> None:
    module = adapt(nn.Linear(256, 512, bias=False).double(), rank=8)
    (forward,) = capture(module, torch.randn(1024, 256, dtype=torch.float64, requires_grad=True)).forward
    assert products(forward, operators.scaled_mm) == [] and len(products(forward, MM)) == 2


def test_marks_are_on_the_branch_alone() -> None:
    module = adapt(QKV(256, 128), rank=8)
    x = torch.randn(64, 256, requires_grad=True)
    captured = capture(lambda x: sum(y.sum() for y in module(x)), x, backward=True)
    for graph in captured.forward + captured.backward:
        for node in products(graph, MM):
            assert bool(node.meta.get(MARK)) == (24 in (*sizes(node), inner(node)))


LARGE = {"shape": (2, 512, 256), "seeds": 3}
CASES = [
    Case(
        "qkv bf16",
        lambda: adapt(QKV(256, 128).bfloat16(), rank=8),
        3,
        {"scale": 3, "stack(3)": 3, "accumulate": 3},
        {"scale": 3, "stack(3)": 3, "pair": 3},
        dtype=torch.bfloat16,
        **LARGE,  # type: ignore[arg-type]
    ),
    Case(
        "linear fp32, dynamic",
        lambda: adapt(nn.Linear(256, 512), rank=7),
        1,
        {"scale": 1, "accumulate": 1},
        {"scale": 1, "pair": 1, "accumulate": 1},
        dynamic=True,
        **LARGE,  # type: ignore[arg-type]
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case: Case) -> None:
    """Kernels and all, as accurate as plain `torch.compile`."""
    check_case(case, by_kernels)


@pytest.mark.parametrize(
    ("features", "types"),
    [
        ("avx512f avx512_bf16", {torch.float32, torch.bfloat16, torch.float16}),
        ("avx512f avx512_bf16 amx_tile amx_bf16", {torch.float32, torch.float16}),
        ("avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16", {torch.float32}),
    ],
    ids=["vectors", "tiles of bfloat16", "and vectors of float16"],
)
def test_what_onednn_does_faster_is_left_to_it(
    features: str, types: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    native.library()  # which is built for the CPU that this is
    monkeypatch.setattr(native, "has_faster_products", HAS_FASTER_PRODUCTS)
    monkeypatch.setattr(native, "_features", lambda: f"flags : fpu {features}")
    native.max_rank.cache_clear()
    x, a = torch.randn(512, 512), torch.randn(512, 4)
    try:
        found = {dtype for dtype in DTYPES if native.scaled_mm(x.to(dtype), a.to(dtype), 1.0) is not None}
    finally:
        native.max_rank.cache_clear()
    assert found == (types if torch.backends.mkldnn.is_available() else set(DTYPES))


# ---- without kernels -------------------------------------------------------------------------------------------------

NO_COMPILER = """
import torch
from lora_fx.passes.kernels import native, operators
x, a, h = torch.randn(512, 512), torch.randn(512, 16), torch.randn(512, 16)
for _ in range(3):
    torch.testing.assert_close(operators.scaled_mm(x, a, torch.tensor(0.5)), 0.5 * x @ a)
    grad_h, grad_b = operators.gradient_pair(x, a, h)
    torch.testing.assert_close(grad_h, x @ a)
    torch.testing.assert_close(grad_b, x.t() @ h)
assert native.library() is None and native.max_rank(torch.float32) == 0
"""


def test_a_failed_build_is_shown_once_and_is_not_fatal(tmp_path: Path) -> None:
    env = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The CPU kernels of lora_fx (thin.cpp) could not be built") == 1
