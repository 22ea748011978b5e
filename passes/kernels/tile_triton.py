"""Triton kernels of tile programs.

The source of a kernel is written statement by statement, so that a value is a tile in registers from the load to the
store. What does not change along the walk is loaded once: the factors and columns of a program that walks down its
rows, the thin matrices and rows of one that walks along its columns; and so are the sums that it walks over kept in
registers (``across`` when walking down, ``down`` when walking along) and written once as a part.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fx.passes.kernels.tile_program import Program, Statement, loads

_OPS = {
    "identity": "{0}",
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "neg": "(-{0})",
    "abs": "tl.abs({0})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "reciprocal": "(1.0 / {0})",
    "sigmoid": "tl.sigmoid({0})",
    # Not 1 - 2 / (exp(2 x) + 1): that loses every digit of a small x. libdevice is not in Triton's interpreter.
    "tanh": "(2.0 * tl.sigmoid(2.0 * {0}) - 1.0)",
    "erf": "tl.erf({0})",
    "relu": "tl.maximum({0}, 0.0)",
    "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "where": "tl.where({0}, {1}, {2})",
}
_TYPES = {"bfloat16": "tl.bfloat16", "float16": "tl.float16", "float32": "tl.float32"}


def padded(rank: int) -> int:
    """The inner size that the tensor cores get for a rank: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(rank))


class _Writer:
    """Writes the source of one kernel."""

    def __init__(self, program: Program) -> None:
        self.program, self.down_rows = program, program.tile.walk == "rows"
        self.before: list[str] = []
        self.inside: list[str] = []
        self.after: list[str] = []
        self.loaded: dict[tuple[int, str], str] = {}

    def source(self) -> str:
        """The kernel's text."""
        program, tile = self.program, self.program.tile
        names = [f"in{i}" for i in range(len(program.inputs))]
        names += [f"stride{i}" for i, kind in enumerate(program.inputs) if kind[0] == "full"]
        names += [f"{n}{i}" for i, kind in enumerate(program.inputs) if kind[0] in ("thin", "factor") for n in ("outer", "inner")]
        names += [f"out{i}" for i in range(len(program.outputs))]
        for index, statement in enumerate(program.body):
            self._statement(index, statement)
        steps = (tile.rows if self.down_rows else tile.columns) // tile.step
        m = f"pm * {tile.rows}" + (f" + step * {tile.step} + tl.arange(0, {tile.step})" if self.down_rows else f" + tl.arange(0, {tile.rows})")
        n = f"pn * {tile.columns}" + (f" + tl.arange(0, {tile.columns})" if self.down_rows else f" + step * {tile.step} + tl.arange(0, {tile.step})")
        fixed, moving = ((f"n = {n}", f"m = ({m}).to(tl.int64)") if self.down_rows else (f"m = ({m}).to(tl.int64)", f"n = {n}"))
        lines = [
            "@triton.jit",
            f"def kernel({', '.join(names)}, M, EVEN_ROWS: tl.constexpr):",
            "    pn, pm = tl.program_id(0), tl.program_id(1)",
            f"    {fixed}",
            *(f"    {line}" for line in self.before),
            f"    for step in range(0, {steps}):",
            f"        {moving}",
            *(f"        {line}" for line in self.inside),
            *(f"    {line}" for line in self.after),
        ]
        return "\n".join(lines) + "\n"

    # ---- masks: a comparison that always holds is not written ------------------------------------------------------

    @property
    def _even_columns(self) -> bool:
        return self.program.columns % self.program.tile.columns == 0

    def _mask(self, row: str | None, column: str | None, rank: tuple[str, int] | None = None) -> str:
        """The condition under which an element exists, for the index expressions of what it has."""
        conditions = []
        if row is not None:
            conditions.append(f"(({row} < M) | EVEN_ROWS)")
        if column is not None and not self._even_columns:
            conditions.append(f"({column} < {self.program.columns})")
        if rank is not None and padded(rank[1]) != rank[1]:
            conditions.append(f"({rank[0]} < {rank[1]})")
        return " & ".join(conditions)

    @staticmethod
    def _load(pointer: str, mask: str, hint: str = "") -> str:
        return f"tl.load({pointer}, mask={mask}, other=0.0{hint})" if mask else f"tl.load({pointer}{hint})"

    # ---- operands ------------------------------------------------------------------------------------------------

    def _fixed(self, along_rows: bool) -> list[str]:
        """Where to put something that varies with rows (or with columns) only: before the loop if it can."""
        return self.inside if along_rows == self.down_rows else self.before

    def _value(self, index: int) -> str:
        """A full, row, column or number input as float32 that broadcasts to a tile."""
        kind, key = self.program.inputs[index][0], (index, "value")
        if key not in self.loaded:
            name = self.loaded[key] = f"x{index}"
            if kind == "full":
                pointer = f"in{index} + m[:, None] * stride{index} + n[None, :]"
                where, text = self.inside, self._load(pointer, self._mask("m[:, None]", "n[None, :]"))
            elif kind == "row":
                where, text = self._fixed(True), self._load(f"in{index} + m[:, None]", self._mask("m[:, None]", None))
            elif kind == "column":
                where, text = self._fixed(False), self._load(f"in{index} + n[None, :]", self._mask(None, "n[None, :]"))
            else:
                where, text = self.before, f"tl.load(in{index})"
            where.append(f"{name} = {text}.to(tl.float32)")
        return self.loaded[key]

    def _thin(self, index: int) -> str:
        """A thin input's tile [rows, R]."""
        key = (index, "thin")
        if key not in self.loaded:
            name = self.loaded[key] = f"t{index}"
            rank = self.program.rank(index)
            where = self._fixed(True)
            where.append(f"r{index} = tl.arange(0, {padded(rank)})")
            pointer = f"in{index} + m[:, None] * outer{index} + r{index}[None, :] * inner{index}"
            where.append(f"{name} = {self._load(pointer, self._mask('m[:, None]', None, (f'r{index}[None, :]', rank)))}")
        return self.loaded[key]

    def _factor(self, index: int) -> str:
        """A factor's tile [columns, R]."""
        key = (index, "factor")
        if key not in self.loaded:
            name = self.loaded[key] = f"f{index}"
            rank = self.program.rank(index)
            where = self._fixed(False)
            where.append(f"r{index} = tl.arange(0, {padded(rank)})")
            pointer = f"in{index} + n[:, None] * outer{index} + r{index}[None, :] * inner{index}"
            where.append(f"{name} = {self._load(pointer, self._mask(None, 'n[:, None]', (f'r{index}[None, :]', rank)))}")
        return self.loaded[key]

    def _for_product(self, value: int) -> str:
        """A value as the operand of a product: rounded as it would be in memory, and zero outside of the matrix."""
        key = (value, "rounded")
        if key not in self.loaded:
            name = self.loaded[key] = f"d{value}"
            # A value that is only loaded is zero there already; others may have become infinite or NaN.
            mask = "" if self.program.body[value][0] == "load" else self._mask("m[:, None]", "n[None, :]")
            text = f"tl.where({mask}, v{value}, 0.0)" if mask else f"v{value}"
            self.inside.append(f"{name} = {text}.to({_TYPES[self.program.dtype]})")
        return self.loaded[key]

    # ---- statements ----------------------------------------------------------------------------------------------

    def _statement(self, index: int, statement: Statement) -> None:
        kind, tile = statement[0], self.program.tile
        if kind == "load":
            self.inside.append(f"v{index} = {self._value(statement[1])}")
        elif kind == "product":
            thin, factor = self._thin(statement[1]), self._factor(statement[2])
            scale = "" if statement[3] is None else f" * {self._value(statement[3])}"
            self.inside.append(f"v{index} = tl.dot({thin}, tl.trans({factor})){scale}")
        elif kind == "op":
            operands = [repr(float(o[0])) if isinstance(o, list) else f"v{o}" for o in statement[2]]
            self.inside.append(f"v{index} = {self._op(statement[1], operands)}")
        else:
            out = [id(s) for s in self.program.outputs].index(id(statement))
            if kind == "store":
                self._store(out, statement)
            elif kind == "down":
                self._down(out, statement)
            else:
                self._across(out, statement)
        assert tile.step > 0

    @staticmethod
    def _op(name: str, operands: list[str]) -> str:
        if name == "pow":
            base, exponent = operands[0], float(operands[1])
            if exponent in (1.0, 2.0, 3.0):
                return "(" + " * ".join([base] * int(exponent)) + ")"
            return f"tl.exp({exponent} * tl.log({base}))"
        return _OPS[name].format(*operands)

    def _store(self, out: int, statement: Statement) -> None:
        shape = f"({', '.join(str(s) for s in self._tile_shape())})"
        value = f"tl.broadcast_to(v{statement[1]}, {shape}).to({_TYPES[statement[2]]})"
        pointer = f"out{out} + m[:, None] * {self.program.columns} + n[None, :]"
        self.inside.append(self._write(pointer, value, self._mask("m[:, None]", "n[None, :]")))

    def _tile_shape(self) -> tuple[int, int]:
        tile = self.program.tile
        return (tile.step, tile.columns) if self.down_rows else (tile.rows, tile.step)

    @staticmethod
    def _write(pointer: str, value: str, mask: str) -> str:
        return f"tl.store({pointer}, {value}, mask={mask})" if mask else f"tl.store({pointer}, {value})"

    def _down(self, out: int, statement: Statement) -> None:
        rank = self.program.rank(statement[2])
        value, factor = self._for_product(statement[1]), self._factor(statement[2])
        where = self.inside if self.down_rows else self.after
        if self.down_rows:
            self.inside.append(f"a{out} = tl.dot({value}, {factor})")
        else:
            self.before.append(f"a{out} = tl.zeros(({self.program.tile.rows}, {padded(rank)}), tl.float32)")
            self.inside.append(f"a{out} = tl.dot({value}, {factor}, a{out})")
        where.append(f"k{out} = tl.arange(0, {padded(rank)})")
        pointer = f"out{out} + (pn.to(tl.int64) * M + m[:, None]) * {rank} + k{out}[None, :]"
        where.append(self._write(pointer, f"a{out}", self._mask("m[:, None]", None, (f"k{out}[None, :]", rank))))

    def _across(self, out: int, statement: Statement) -> None:
        rank, n = self.program.rank(statement[2]), self.program.columns
        value, thin = self._for_product(statement[1]), self._thin(statement[2])
        where = self.after if self.down_rows else self.inside
        if self.down_rows:
            self.before.append(f"a{out} = tl.zeros(({self.program.tile.columns}, {padded(rank)}), tl.float32)")
            self.inside.append(f"a{out} = tl.dot(tl.trans({value}), {thin}, a{out})")
        else:
            self.inside.append(f"a{out} = tl.dot(tl.trans({value}), {thin})")
        where.append(f"k{out} = tl.arange(0, {padded(rank)})")
        place = (
            f"n[:, None] * {rank} + k{out}[None, :]" if statement[3] == "NR" else f"k{out}[None, :] * {n} + n[:, None]"
        )
        pointer = f"out{out} + pm.to(tl.int64) * {n * rank} + {place}"
        where.append(self._write(pointer, f"a{out}", self._mask(None, "n[:, None]", (f"k{out}[None, :]", rank))))


def source(program: Program) -> str:
    """The source of the kernel of ``program``."""
    return _Writer(program).source()


@functools.lru_cache(maxsize=1024)
def kernel(text: str) -> Any:
    """The Triton function of the program that ``text`` describes. Triton reads its source, so that is put on record."""
    code = source(loads(text))
    name = f"<lora_fx tile {hashlib.sha256(code.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(code, name, "exec"), namespace)
    return namespace["kernel"]


def run(text: str, inputs: list[Tensor]) -> list[Tensor]:
    """Run the kernel of the program that ``text`` describes on ``inputs``; gives its outputs."""
    program = loads(text)
    tile, m, device = program.tile, int(program.row_count(inputs)), inputs[0].device
    outputs = []
    for statement in program.outputs:
        shape, dtype = program.output_shape(statement, m)
        outputs.append(torch.empty(shape, dtype=dtype, device=device))
    tensors = [_prepared(kind, t, program.columns) for kind, t in zip(program.inputs, inputs)]
    strides = [t.stride(0) for kind, t in zip(program.inputs, tensors) if kind[0] == "full"]
    for kind, t in zip(program.inputs, tensors):
        if kind[0] in ("thin", "factor"):
            strides += t.stride() if kind[-1] != "RN" else reversed(t.stride())
    grid = (-(-program.columns // tile.columns), -(-m // tile.rows))
    if m:
        kernel(text)[grid](
            *tensors, *strides, *outputs, m, EVEN_ROWS=m % tile.rows == 0, num_warps=tile.warps, num_stages=tile.stages
        )
    return outputs


def _prepared(kind: list[Any], tensor: Tensor, columns: int) -> Tensor:
    """The tensor as the kernel indexes it: a value as a matrix whose rows are contiguous, rows and columns as such."""
    if kind[0] == "full":
        matrix = tensor.reshape(-1, columns)
        return matrix if matrix.stride(1) == 1 else matrix.contiguous()
    return tensor.contiguous() if kind[0] in ("row", "column") else tensor
