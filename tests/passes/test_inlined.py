"""Launches that Inductor makes: they are those of the operators, and what they compute is right.

The second half runs Inductor's code with all of its kernels in Triton's interpreter, in a process of its own, for the
reasons that `tests/passes/test_tile_kernels.py` gives.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("triton.backends.nvidia", reason="needs Triton's compiler for NVIDIA's GPUs")

from benchmarks.cases import SUITE
from benchmarks.forms import Block as LlamaBlock

import lora_fx
from lora_fx.beside import lay_beside
from lora_fx.passes.kernels import inlined, operators, part_sums, tile_launch, tile_triton
from lora_fx.passes.kernels.tile_program import Program, Tile
from tests.passes import fake_gpu, harness, modules
from tests.passes.fake_gpu import Called, Recorded
from tests.passes.interpreter import INTERPRETED, run_interpreted


def call_operators(patch: pytest.MonkeyPatch) -> None:
    """Have Inductor call the operators."""
    for each in ("tile", "sum_parts"):
        patch.setattr(inlined, each, lambda *arguments: NotImplemented)


def block(name: str, *, lowered: bool = True) -> Recorded:
    """A block of the suite, as Inductor launches it; or not `lowered`, so that it calls operators."""
    case = SUITE[name][0]
    with pytest.MonkeyPatch.context() as patch, fake_gpu.recorded() as (found, backend):
        if not lowered:
            call_operators(patch)
        model = LlamaBlock(case)
        lora_fx.install(model, lora_fx.LoRAConfig(rank=case.rank, alpha=2 * case.rank, dropout=case.dropout))
        x = torch.empty(case.shape, dtype=torch.bfloat16, requires_grad=not case.no_grad)
        with torch.set_grad_enabled(not case.no_grad):
            fake_gpu.train(model, backend, x)
    return found


def launched(arguments: tuple[Any, ...]) -> tuple[str, dict[str, Any], tuple[int, ...], str]:
    """What an operator launches: the kernel's name, its arguments, its grid, its source."""
    if isinstance(arguments[1], str):
        outputs, program, inputs = arguments
        found = tile_launch.launch(program, tile_launch.layouts(inputs), tile_launch.layouts(outputs))
        tensors = [*(tile_launch.laid_out(t, strides) for t, strides in zip(inputs, found.strides)), *outputs]
        function = tile_triton.kernel(program)
        given = {**dict(zip(found.tensors, tensors, strict=True)), **found.numbers}
        return function.__name__, given, (*found.grid, 1, 1)[:3], function.src
    parts, scales, dtype, stacked = (*arguments, False)[:4]
    sums = part_sums.launch([part.shape for part in parts], tuple(s is not None for s in scales), stacked)
    outputs = [parts[0].new_empty(size, dtype=dtype) for size in sums.outputs]
    function = part_sums.kernel(sums.scaled, sums.ranks)
    return function.__name__, sums.arguments(outputs, parts, scales), (sums.blocks, 1, 1), function.src


def described(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments, with what a kernel sees of a tensor, and which of them share memory."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    shared = [
        (a, b)
        for a in tensors
        for b in tensors
        if a < b and tensors[a].untyped_storage()._cdata == tensors[b].untyped_storage()._cdata
    ]
    seen = {
        name: (tuple(t.stride()) if "parts" in name else t.numel(), t.dtype, t.storage_offset())
        for name, t in tensors.items()
    }
    return {**arguments, **seen, "shared": shared}


def check_attributes(call: Called, *, static: bool) -> None:
    """Inductor tells Triton that an argument is a multiple of 16 where it is; for static sizes, of every number."""
    names = list(call.meta["signature"])
    (marked,) = call.meta["configs"]
    told = {names[place] for (place,) in marked}
    for name, value in call.arguments.items():
        if isinstance(value, Tensor):
            assert name not in told or value.storage_offset() * value.element_size() % 16 == 0, (call.name, name)
        elif value != 1:
            assert (name in told) <= (value % 16 == 0), (call.name, name, value)
            assert not static or (name in told) == (value % 16 == 0), (call.name, name, value)


def check_same(ours: list[Called], theirs: list[tuple[Any, ...]], *, even: bool = True) -> None:
    """Launches are those of the operators; unless ``even``, no kernel knows that its rows fill its tiles."""
    assert len(ours) == len(theirs) > 0
    wanted = [launched(arguments) for arguments in theirs]
    for _, arguments, *_ in wanted:
        arguments.update({} if even else {name: False for name in arguments if name.endswith("EVEN_ROWS")})
    for call in ours:
        check_attributes(call, static=even)
        given = {**call.arguments, **{k: v for k, v in call.meta["constants"].items() if k not in call.arguments}}
        found = next(
            (
                i
                for i, (name, arguments, grid, _) in enumerate(wanted)
                if (name, grid, described(arguments)) == (call.name, call.grid, described(given))
            ),
            None,
        )
        assert found is not None, (call.name, described(given), [w for w in wanted if w[0] == call.name])
        *_, source = wanted.pop(found)
        assert source in call.source.replace("\\n", "\n")


def check_definitions(code: str) -> None:
    """Kernels are of the kind that is launched without Triton, and each is there once."""
    assert "user_autotune" not in code
    kernels = re.findall(r"async_compile\.triton\('lora_fx_\w+', '''(.*?)'''", code, re.DOTALL)
    texts = [re.sub(r"'kernel_name': '\w+'", "", text) for text in kernels]
    assert len(set(texts)) == len(texts) and all("@triton_heuristics.template(" in text for text in texts)


if not INTERPRETED:

    @pytest.mark.parametrize(
        "name",
        [
            "decode-64",
            *(
                pytest.param(case, marks=pytest.mark.slow)
                for case in ("m512", "m8192", "dropout", "r64", "fp8", "checkpoint", "prefill")
            ),
        ],
    )
    def test_launches_are_those_of_the_operators(name: str) -> None:
        ours, theirs = block(name), block(name, lowered=False)
        assert not ours.operators and not theirs.ours
        check_same(ours.ours, theirs.operators)
        for code in ours.codes:
            check_definitions(code)

    @pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_gradients_of_siblings_are_written_once(dynamic: bool) -> None:
        """Beside each other, by the kernels that compute them: no kernel reads what another one wrote for it."""
        model = harness.adapt(modules.Attention(256).to(torch.bfloat16).requires_grad_(False), rank=8)
        lay_beside(model, "cpu")
        x = torch.randn(2, 80, 256, dtype=torch.bfloat16, requires_grad=True)
        with fake_gpu.recorded() as (found, backend):
            fake_gpu.train(model, backend, x, dynamic=dynamic)
        lines = found.codes[-1].splitlines()
        places = {line.split()[0] for line in lines if line.endswith("# alias")}
        runs = [re.findall(r"\bbuf\d+\b", line) for line in lines if "triton_" in line and ".run(" in line]
        writers = [buffers for buffers in runs if buffers[-1] in places]
        assert len(places) == len(writers) == 3  # dq, dk and dv
        written = {buffers[-1] for buffers in runs}
        assert not any(written.intersection(buffers[:-1]) for buffers in writers)

    def test_no_launch_has_more_arguments_than_inductor_can_launch() -> None:
        """The sums of all gradients of a model that is compiled as a whole."""
        parts = [torch.randn(3, 8 + i, 4) for i in range(47)]

        def sums(*parts: Tensor) -> list[Tensor]:
            return operators.sum_parts(list(parts), [None] * len(parts), torch.bfloat16)

        with fake_gpu.recorded() as (found, backend):
            totals = torch.compile(sums, backend=backend, dynamic=False, fullgraph=True)(*parts)
        assert [total.shape for total in totals] == [part.shape[1:] for part in parts]
        assert len(found.ours) == 3 and not found.operators
        assert max(len(call.arguments) for call in found.ours) <= inlined.MOST_ARGUMENTS

    @pytest.mark.slow
    @pytest.mark.parametrize("build", [modules.Residual, modules.Mlp], ids=lambda build: build.__name__)
    def test_tokens_that_are_known_when_it_runs(build: Any) -> None:
        """One code for any number of them: rows are masked, grids are expressions."""
        model = harness.adapt(build().bfloat16())
        with fake_gpu.recorded() as (found, backend):
            function = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
            for tokens in (600, 333):
                function(torch.randn(2, tokens, 48, dtype=torch.bfloat16).requires_grad_()).sum().backward()
        assert not found.operators and len(found.codes) == 2, "compiled again"
        first, second = found.ours[: len(found.ours) // 2], found.ours[len(found.ours) // 2 :]
        for tokens, calls in ((1200, first), (666, second)):
            for call in calls:
                if "M" in call.arguments:
                    assert call.arguments["M"] == tokens and call.meta["constants"]["EVEN_ROWS"] is False
        same = [(call.name, {n: v for n, v in call.arguments.items() if isinstance(v, int)}) for call in first]
        assert [name for name, _ in same] == [call.name for call in second]
        # As the operators would be launched.
        with pytest.MonkeyPatch.context() as patch, fake_gpu.recorded() as (theirs, backend):
            call_operators(patch)
            function = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
            for tokens in (600, 333):
                function(torch.randn(2, tokens, 48, dtype=torch.bfloat16).requires_grad_()).sum().backward()
        check_same(found.ours, theirs.operators, even=False)

    @pytest.mark.slow
    @pytest.mark.timeout(900)  # a machine that is three times as slow as usual, and busy, still passes
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:

    def update() -> str:
        """y = base + thin factor^T."""
        body: list[Any] = [["load", 0], ["product", 1, 2, None], ["op", "add", [0, 1]], ["store", 2, "float16"]]
        inputs: list[Any] = [["full"], ["thin", 4], ["factor", 4, "NR"]]
        return Program(40, "float16", inputs, body, Tile(rows=32, columns=32, step=16, walk="rows")).dumps()

    UPDATE = update()

    def in_place(x: Tensor, w: Tensor, thin: Tensor, factor: Tensor) -> Any:
        a = x @ w
        before = torch.relu(a)
        operators.tile_([a], UPDATE, [a, thin, factor])
        return before, a * 2, a

    def twice(x: Tensor, w: Tensor, thin: Tensor, factor: Tensor) -> Any:
        a = x @ w
        operators.tile_([a], UPDATE, [a, thin, factor])
        between = a.sum(0)
        operators.tile_([a], UPDATE, [a, thin, factor])
        return between, a

    def into_a_view(x: Tensor, w: Tensor, thin: Tensor, factor: Tensor) -> Any:
        """Not contiguous: written by way of a copy."""
        a = torch.zeros(50, 80, dtype=torch.float16)
        base = x @ w
        operators.tile_([a[:, 40:]], UPDATE, [base, thin, factor])
        return a, base + 1

    def into_another(x: Tensor, w: Tensor, thin: Tensor, factor: Tensor) -> Any:
        """Operands in all layouts."""
        a, base = torch.empty(50, 40, dtype=torch.float16), (w.t() @ x.t()).t()
        operators.tile_([a], UPDATE, [base, thin.t().contiguous().t(), factor.t().contiguous().t()])
        return a, base - a

    def of_an_input(x: Tensor, w: Tensor, thin: Tensor, factor: Tensor) -> Any:
        """What the caller sees changed."""
        before = w.sum()
        operators.tile_([w], UPDATE, [w, thin[:24], factor])
        return before, w + 1

    @pytest.mark.parametrize(
        "function", [in_place, twice, into_a_view, into_another, of_an_input], ids=lambda f: f.__name__
    )
    def test_writing_over_memory_that_is_read(function: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = ((50, 24), (24, 40), (50, 4), (40, 4))
        given = [torch.randn(shape, generator=generator).to(torch.float16) for shape in shapes]
        copies = [t.clone() for t in given]
        expected = function(*copies)
        with fake_gpu.recorded("cpu", interpret=True) as (found, backend), torch.no_grad():
            results = torch.compile(function, backend=backend, fullgraph=True)(*given)
        assert found.ours and not found.operators
        for one, other in zip((*results, *given), (*expected, *copies), strict=True):
            torch.testing.assert_close(one, other, rtol=4e-3, atol=4e-3)

    class Gate(nn.Module):
        """Two branches under one gate: each program computes the gate again, of a product that the other reads too."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.a, self.b = (nn.Linear(64, 128, bias=False) for _ in range(3))

        def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            gate = torch.sigmoid(self.gate(x))
            return gate * self.a(x), gate * self.b(x)

    class GatedInputs(Gate):
        """The same in backward, of what forward saved, which Inductor gives to whoever reads it last."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(128, 96, bias=False) for _ in range(2))

        def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
            gate, (first, second, third, fourth) = torch.sigmoid(self.gate(x)), more
            return self.a(gate * (first + 0.5 * second)), self.b(gate * (third + 0.5 * fourth))

    @pytest.mark.parametrize("tokens", [128, 2176], ids=["one launch", "two launches"])
    @pytest.mark.parametrize("build", [Gate, GatedInputs], ids=lambda build: build.__name__)
    def test_nothing_is_written_over_that_another_program_reads(build: Any, tokens: int) -> None:
        torch.manual_seed(0)
        model = build().half()
        lora_fx.install(model, lora_fx.LoRAConfig(rank=16, target_modules=["a", "b"]))
        for linear in (model.a, model.b):
            nn.init.normal_(linear.lora_b)
            linear.lora_a.requires_grad_(False)  # dX alone reads what was saved
        trains = build is GatedInputs
        inputs = [torch.randn(tokens, n, dtype=torch.float16) for n in (64, 128, 128, 128, 128)]

        def values(function: Any) -> list[Tensor]:
            given = [inputs[0], *(t.clone().requires_grad_(trains) for t in inputs[1:])]
            with torch.set_grad_enabled(trains):
                results = function(*given)
            if trains:
                torch.autograd.backward(results, [torch.ones_like(y) for y in results])
            return [*results, *(t.grad for t in given[1:] if t.grad is not None)]

        expected = values(model)
        with fake_gpu.recorded("cpu", interpret=True) as (found, backend):
            results = values(torch.compile(model, backend=backend, fullgraph=True))
        assert found.ours and not found.operators
        for one, other in zip(results, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=4e-3, atol=4e-2)

    class Wide(nn.Module):
        """In a checkpoint, gate and up compute h as well, forward and again: there are gaps between their rows."""

        def __init__(self) -> None:
            super().__init__()
            self.mlp = modules.Mlp(48, 128)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.mlp, x, use_reentrant=False)

    @pytest.mark.parametrize(
        ("build", "tokens", "dropout"),
        [
            (modules.Residual, 20, 0.0),
            (modules.Mlp, 20, 0.25),
            (modules.Mlp, 160, 0.0),
            (modules.Block, 160, 0.0),
            (Wide, 160, 0.0),
            (modules.Attention, 160, 0.0),
        ],
        ids=["residual", "mlp with dropout", "mlp", "block", "mlp with h beside", "attention, side by side"],
    )
    def test_what_inductor_launches_is_right(build: Any, tokens: int, dropout: float) -> None:
        """A step of training: all memory that Inductor gave to a kernel holds NaN until something is written there."""
        torch.manual_seed(0)
        model, is_laid = build().to(torch.float16), build in (Wide, modules.Attention)
        lora_fx.install(model, lora_fx.LoRAConfig(rank=8 if is_laid else 4, alpha=8, dropout=dropout))
        case = harness.Case("", build, 0, {}, shape=(2, tokens, 48), dtype=torch.float16, seeds=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_b" in name:
                    parameter.normal_(std=0.2)
        if is_laid:
            lay_beside(model, "cpu")
        forms: dict[bool, harness.Outcome] = {}
        for lowered in (True, False):
            with (
                pytest.MonkeyPatch.context() as patch,
                fake_gpu.recorded("cpu", interpret=True) as (found, backend),
            ):
                if not lowered:
                    call_operators(patch)
                function = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
                forms[lowered] = harness.run(case, model, function, case.dtype)
            assert bool(found.ours) == lowered and bool(found.operators) != lowered
            # Each of two (of 320 rows), or all three, in forward; of a checkpoint once more, and dX of attention.
            counts = [
                sum(code.count(f"lora_fx.{n}.default(") for code in found.codes) for n in ("stacked_mm", "joined_mm")
            ]
            assert counts == {Wide: [4, 0], modules.Attention: [1, 1]}.get(build, [0, 0])
        # The operators run as ATen, and draw the same masks.
        for name in forms[True].tensors[0]:
            assert harness.error(forms[True].tensors, forms[False].tensors, name) < 4e-3, name
        if dropout:
            return
        exact = harness.by_eager(case, case.oracle(model), dtype=torch.float64)
        plain = harness.by_eager(case, model, dtype=torch.float16)
        for name in exact.tensors[0]:
            errors = [harness.error(form.tensors, exact.tensors, name) for form in (forms[True], plain)]
            assert errors[0] <= 1.5 * errors[1] + 1e-5, (name, errors)
