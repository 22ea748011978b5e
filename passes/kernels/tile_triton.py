"""Triton kernels of tile programs.

The source of a kernel is written statement by statement, so that a value is a tile in registers from the load to the
store. What does not change along the walk is loaded once: the factors and columns of a program that walks down its
rows, the thin matrices and rows of one that walks along its columns; and so are the sums that it walks over kept in
registers (``across`` when walking down, ``down`` when walking along) and written once as a part.
"""

from __future__ import annotations

import functools
from typing import Any

from lora_fx.passes.kernels import dropout
from lora_fx.passes.kernels.define import define
from lora_fx.passes.kernels.dropout import MIX, ODD, Steps, threshold
from lora_fx.passes.kernels.tile_arithmetic import constant, operation, padded
from lora_fx.passes.kernels.tile_experts import count, owner, summed, zeros
from lora_fx.passes.kernels.tile_factors import factored, idle
from lora_fx.passes.kernels.tile_names import Names, head, name_of_all
from lora_fx.passes.kernels.tile_program import OUTPUTS, Program, Statement, numbers, split

# The line that defines the rows of a step: what is loaded first comes after it.
_ROWS = "m = row + i"
_TYPES = {"bfloat16": "tl.bfloat16", "float16": "tl.float16", "float32": "tl.float32"}


class _Writer:
    """Writes the source of one kernel, or of what one of several programs does in a launch, as function ``name``."""

    def __init__(self, program: Program, name: str = "") -> None:
        self.program, self.down_rows, self.name = program, program.tile.walk == "rows", name
        self.before: list[str] = []
        self.inside: list[str] = []
        self.after: list[str] = []
        self.loaded: set[str] = set()
        self.strip = 0
        self.idle = idle(program)
        self.summed = summed(program, self.idle)
        self.rounded = {s[1] for s in program.outputs if s[0] != "store" or s[2] == program.dtype}

    def source(self) -> str:
        """The kernel's text.

        Addresses are a 64-bit number for the tile plus 32-bit offsets within it, which do not change along the walk and
        are the same for all values of the pass. In a step, arithmetic comes first and what reads its results after it:
        by then a value is held in 16 bits, once, and not in 32 beside all that it was made of.
        """
        program, tile = self.program, self.program.tile
        rows, width = self._tile_shape()
        first = "first" if program.experts else f"pm * {tile.rows}"
        self.before += owner(program)
        self._fixed(True).append(f"row = {first} + step * {tile.step}" if self.down_rows else f"row = {first}")
        self._fixed(True).append(_ROWS)
        for self.strip in range(tile.strips):
            column = f"pn * {tile.columns} + " + (f"{self.strip * width}" if self.down_rows else f"step * {tile.step}")
            self._fixed(False).append(f"column{self.strip} = {column}")
            self._fixed(False).append(f"{self._n} = column{self.strip} + j")
            for index in sorted(set(range(len(program.body))) - self.idle, key=self._turn):
                self._statement(index, program.body[index])
        if self.name:
            begin = ["@triton.jit", f"def {self.name}({', '.join(('pn', 'pm', *Names(program).typed))}):"]
        else:
            begin = head([program], [Names(program)])
            begin.append("    pn, pm = tl.program_id(0), tl.program_id(1)")
        lines = [
            *begin,
            f"    i, j = tl.arange(0, {rows}), tl.arange(0, {width})",
            *(f"    {line}" for line in self.before),
            f"    for step in tl.range(0, {self._steps()}, num_stages={tile.stages}):",
            *(f"        {line}" for line in self.inside),
            *(f"    {line}" for line in self.after),
            *(f"    {line}" for line in zeros(program)),
        ]
        return "\n".join(lines) + "\n"

    def _turn(self, index: int) -> tuple[int, int]:
        """When a statement is written: in a walk of one step, of which there is no pipeline, all is loaded at first."""
        kind, tile = self.program.body[index][0], self.program.tile
        early = kind == "load" and tile.step == (tile.rows if self.down_rows else tile.columns)
        return (-1 if early else int(kind in OUTPUTS)), index

    def _steps(self) -> str:
        """How many steps the walk has.

        The assembler writes a walk of short steps out in full if it knows that they are 32 or fewer: h of N 4096 and
        R 16 becomes 14 times as many instructions, of as many registers, and takes it seconds (0.02 s otherwise). Down
        the rows it is sums both ways that cost it time, in 4 and 8 steps: g and dB of N 14336 and 2048 rows 0.49 s
        instead of 0.07, for twice as many instructions; of 16 steps it makes a loop. A number of rows is never
        negative, but the assembler does not know that.
        """
        tile = self.program.tile
        steps = (tile.rows if self.down_rows else tile.columns) // tile.step
        if self.program.experts:
            rows = count(self.program)
            there = f"tl.cdiv({rows}, {tile.step})" if self.down_rows else f"{rows} * {steps}"
            return f"tl.minimum({there}, {steps})"
        names = {statement[0] for statement in self.program.body}
        if self.down_rows:
            is_short = names <= {"load", "op", "down", "across"} and self.program.sums_both_ways and 2 < steps < 16
        else:
            is_short = names <= {"load", "op", "down"}
        return f"{steps} + tl.minimum(M, 0)" if is_short else f"{steps}"

    def _tile_shape(self) -> tuple[int, int]:
        """Rows and columns of what is computed at a time."""
        tile = self.program.tile
        return (tile.step, tile.columns // tile.strips) if self.down_rows else (tile.rows, tile.step)

    def _place(self, value: str) -> str:
        """The address of this tile of a value in memory, an input or an output (:mod:`tile_rows`)."""
        stride, along, first = f"{value}_stride", f"{value}_along", f"{value}_row"
        apart = f"(row // {along}).to(tl.int64) * {value}_apart + (row % {along}).to(tl.int64) * {stride}"
        self._define(first, self._fixed(True), [f"{first} = {apart} if {along} else row.to(tl.int64) * {stride}"])
        return f"{value} + ({first} + column{self.strip}) + (i[:, None] * {stride} + j[None, :])"

    # ---- names and masks -------------------------------------------------------------------------------------------

    @property
    def _n(self) -> str:
        return f"n{self.strip}"

    def _v(self, index: int) -> str:
        return f"v{index}_{self.strip}"

    def _mask(
        self, row: str | None, column: str | None, rank: tuple[str, int] | None = None, owned: bool = False
    ) -> str:
        """The condition under which an element exists, for the index expressions of what it has; what always holds is
        left out. ``owned``: and under which it is an expert's, where there are experts."""
        conditions = []
        if row is not None and self.program.experts:
            conditions.append(f"({row} < {'owned' if owned else 'stop'})")
        elif row is not None:
            conditions.append(f"(({row} < M) | EVEN_ROWS)")
        if column is not None and self.program.columns % self.program.tile.columns:
            conditions.append(f"({column} < {self.program.columns})")
        if rank is not None and padded(rank[1]) != rank[1]:
            conditions.append(f"({rank[0]} < {rank[1]})")
        return " & ".join(conditions)

    @staticmethod
    def _load(pointer: str, mask: str) -> str:
        return f"tl.load({pointer}, mask={mask}, other=0.0)" if mask else f"tl.load({pointer})"

    @staticmethod
    def _write(pointer: str, value: str, mask: str) -> str:
        return f"tl.store({pointer}, {value}, mask={mask})" if mask else f"tl.store({pointer}, {value})"

    # ---- operands ------------------------------------------------------------------------------------------------

    def _fixed(self, along_rows: bool) -> list[str]:
        """Where to put something that varies with rows (or with columns) only: before the loop if it can."""
        return self.inside if along_rows == self.down_rows else self.before

    def _define(self, name: str, where: list[str], lines: list[str]) -> str:
        """Write ``lines``, which define ``name``, once."""
        if name not in self.loaded:
            self.loaded.add(name)
            where += lines
        return name

    def _value(self, index: int) -> str:
        """A full, row, column or number input as float32 that broadcasts to a tile."""
        kind, n, name = self.program.inputs[index][0], self._n, f"x{index}"
        if kind == "full":
            name, where = f"{name}_{self.strip}", self.inside
            mask = self._mask("m[:, None]", f"{n}[None, :]", owned=index in self.summed)
            text = self._load(self._place(f"in{index}"), mask)
        elif kind == "row":
            where, text = self._fixed(True), self._load(f"in{index} + m", self._mask("m", None)) + "[:, None]"
        elif kind == "column":
            name, where = f"{name}_{self.strip}", self._fixed(False)
            text = self._load(f"in{index} + {n}", self._mask(None, n)) + "[None, :]"
        else:
            where, text = self.before, f"tl.load(in{index})"
        return self._define(name, where, [f"{name} = {text}.to(tl.float32)"])

    def _small(
        self, index: int, name: str, along: str, where: list[str], columns: tuple[int, int] | None = None
    ) -> str:
        """The tile of a thin matrix or a factor, or of some of its columns (the first, and how many): ``along`` is the
        index of what it has beside the rank."""
        first, rank = columns or (0, self.program.rank(index))
        r = f"r{index}" if columns is None else f"r{index}_{first}"
        start = f"row.to(tl.int64) * outer{index} + (i" if along == "m" else f"{self._matrix(index)}({along}"
        column = f"{r}[None, :]" if not first else f"({first} + {r})[None, :]"
        pointer = f"in{index} + {start}[:, None] * outer{index} + {column} * inner{index})"
        m, n = (f"{along}[:, None]", None) if along == "m" else (None, f"{along}[:, None]")
        text = self._load(pointer, self._mask(m, n, (f"{r}[None, :]", rank), owned=True))
        return self._define(name, where, [f"{r} = tl.arange(0, {padded(rank)})", f"{name} = {text}"])

    def _matrix(self, index: int) -> str:
        """Where the expert's matrix of a stack begins."""
        size = self.program.columns * self.program.rank(index)
        return f"whose.to(tl.int64) * {size} + " if len(self.program.inputs[index]) > 3 else ""

    def _thin(self, index: int, columns: tuple[int, int] | None = None) -> str:
        """[rows, R]."""
        name = f"t{index}" if columns is None else f"t{index}_{columns[0]}"
        if self.program.inputs[index][0] == "parts":
            return self._sum(index, name, columns)
        return self._small(index, name, "m", self._fixed(True), columns)

    def _sum(self, index: int, name: str, columns: tuple[int, int] | None) -> str:
        """[rows, R] that comes in parts, added up in a fixed order, several parts at a time.

        They are loaded as one block. Triton (3.6) would bring each of separate ones into the layout of a product's
        operand before it adds it, through shared memory, and one after the other. And all blocks are loaded before
        anything waits for one, as far as registers hold them.
        """
        _, whole_rank, count, start, whole = self.program.inputs[index]
        first, rank = columns or (0, whole_rank)
        rows, wide = self._tile_shape()[0], padded(rank)
        at_once = max(2, min(8, 4096 // (rows * wide)))
        r, q, block, where = f"r{name}", f"q{name}", f"block{name}", self._fixed(True)
        loads = [
            f"{r}, {q} = tl.arange(0, {wide}), tl.arange(0, {at_once})",
            f"{block} = in{index} + (m[:, None] * {whole} + ({start + first} + {r})[None, :])[None, :, :]",
            f"{block} += {q}[:, None, None] * ({whole} * M)",
        ]
        sums = [f"{name} = tl.zeros(({rows}, {wide}), tl.float32)"]
        held = sum(kind[2] * rows * padded(kind[1]) for kind in self.program.inputs if kind[0] == "parts")
        early = held <= 96 * 32 * self.program.tile.warps
        for group in range(0, count, at_once):
            mask = self._mask("m[None, :, None]", None, (f"{r}[None, None, :]", rank), owned=True)
            mask += f" & ({q}[:, None, None] < {count - group})" if group + at_once > count else ""
            load = f"{block}_{group} = {self._load(f'{block} + {group} * {whole} * M', mask)}"
            (loads if early else sums).append(load)
            sums.append(f"{name} += tl.sum({block}_{group}, axis=0)")
        if name not in self.loaded:
            place = where.index(_ROWS) + 1
            where[place:place] = loads
        return self._define(name, where, [*sums, f"{name} = {name}.to({_TYPES[self.program.dtype]})"])

    def _factor(self, index: int) -> str:
        """[columns, R]."""
        return self._small(index, f"f{index}_{self.strip}", self._n, self._fixed(False))

    def _stack(self, index: int | list[int]) -> list[tuple[int, int, int]]:
        """The factors that a statement names, each with the first of its columns in the stack, and how many it has."""
        found, first = [], 0
        for each in index if isinstance(index, list) else [index]:
            found.append((each, first, self.program.rank(each)))
            first += found[-1][2]
        return found

    def _for_product(self, value: int) -> str:
        """A value as the operand of a product: rounded as it would be in memory, and zero outside of the matrix."""
        name = f"d{value}_{self.strip}"
        # A value that is only loaded is zero there already; others may have become infinite or NaN.
        kind, index = self.program.body[value][:2]
        loaded = kind == "load" and (index in self.summed or not self.program.experts)
        mask = "" if loaded else self._mask("m[:, None]", f"{self._n}[None, :]", owned=True)
        text = f"tl.where({mask}, {self._number(value)}, 0.0)" if mask else self._number(value)
        return self._define(name, self.inside, [f"{name} = {text}.to({_TYPES[self.program.dtype]})"])

    @staticmethod
    def _mixed(name: str, value: str, steps: Steps = MIX) -> list[str]:
        """Lines that set ``name`` to the hash of ``value``, 32 bits without sign."""
        lines = [f"{name} = {value}"]
        for shift, factor in steps:
            mixed = name if shift is None else f"{name} ^ ({name} >> {shift})"
            lines.append(f"{name} = {mixed}" if factor is None else f"{name} = ({mixed}) * {factor}")
        return lines

    def _keep(self, index: int, statement: Statement) -> None:
        """The bits of a pair are computed by both of its columns, as one: the compiler sees that they are equal."""
        seed, v, uint = statement[1], self._v(index), "to(tl.uint32)"
        low, high, key, pair = f"low{seed}", f"high{seed}", f"key{seed}", f"pair{self.strip}"
        halves = [f"seed{seed} = tl.load(in{seed})", *self._mixed(low, f"seed{seed}.{uint}")]
        halves += self._mixed(high, f"(seed{seed} >> 32).{uint} ^ {low}")
        self._define(low, self.before, halves)
        rows = [*self._mixed(key, f"m.{uint} ^ {low}"), f"{key} = {key} ^ {high}"]
        self._define(key, self._fixed(True), rows)
        # A tile begins at an even column, which is kept apart so that the compiler sees it.
        place = f"((column{self.strip} // 2) + (j >> 1)).{uint} * {ODD}"
        self._define(pair, self._fixed(False), [f"{pair} = {place}"])
        self.inside += self._mixed(v, f"{key}[:, None] ^ {pair}[None, :]", dropout.LAST)
        half = f"tl.where(((j & 1) == 0)[None, :], {v} & 0xFFFF, {v} >> 16)"
        self.inside.append(f"{v} = {half} >= {threshold(statement[2])}")

    def _operation(self, name: str, operands: list[Any]) -> str:
        """A pointwise operation; the product of a mask and a number is a choice."""
        if name == "mul" and isinstance(operands[1], list) and self._is_mask(operands[0]):
            return f"tl.where({self._v(operands[0])}, {constant(operands[1][0])}, 0.0)"
        return operation(name, [constant(o[0]) if isinstance(o, list) else self._number(o) for o in operands])

    def _is_mask(self, operand: Any) -> bool:
        return not isinstance(operand, list) and self.program.body[operand][0] == "keep"

    def _number(self, index: int) -> str:
        """A value as float32."""
        return f"tl.where({self._v(index)}, 1.0, 0.0)" if self._is_mask(index) else self._v(index)

    # ---- statements ----------------------------------------------------------------------------------------------

    def _statement(self, index: int, statement: Statement) -> None:
        kind = statement[0]
        if kind == "load":
            self.inside.append(f"{self._v(index)} = {self._value(statement[1])}")
        elif kind == "keep":
            self._keep(index, statement)
        elif kind == "product":
            stack, products = self._stack(statement[2]), []
            for factor, first, rank in stack:
                thin = self._thin(statement[1], (first, rank) if len(stack) > 1 else None)
                products.append(f"tl.dot({thin}, tl.trans({self._factor(factor)}))")
            product = products[0] if len(stack) == 1 else f"({' + '.join(products)})"
            scale = "".join(f" * {self._value(number)}" for number in numbers(statement[3]))
            self.inside.append(f"{self._v(index)} = {product}{scale}")
        elif kind == "op":
            self.inside.append(f"{self._v(index)} = {self._operation(statement[1], statement[2])}")
            if index in self.rounded and not self.program.experts:
                self._for_product(index)
        else:
            out = next(i for i, s in enumerate(self.program.outputs) if s is statement)
            emit = {"store": self._store, "down": self._down, "across": self._across, "largest": self._largest}
            emit[kind](out, statement)

    def _store(self, out: int, statement: Statement) -> None:
        rows, columns = self._tile_shape()
        same = statement[2] == self.program.dtype and not self.program.experts  # nobody's rows are stored as they are
        value = self._for_product(statement[1]) if same else f"{self._number(statement[1])}.to({_TYPES[statement[2]]})"
        value = f"tl.broadcast_to({value}, ({rows}, {columns}))"
        mask = self._mask("m[:, None]", f"{self._n}[None, :]")
        self.inside.append(self._write(self._place(f"out{out}"), value, mask))

    def _down(self, out: int, statement: Statement) -> None:
        tile, whole = self.program.tile, self.program.rank(statement[2])
        value, where = self._for_product(statement[1]), self.inside if self.down_rows else self.after
        for index, first, rank in self._stack(statement[2]):
            a, k, factor = f"a{out}_{first}", f"k{out}_{first}", self._factor(index)
            zero = f"{a} = tl.zeros(({self._tile_shape()[0]}, {padded(rank)}), tl.float32)"
            self._define(a, self.inside if self.down_rows else self.before, [zero])
            self.inside.append(f"{a} = tl.dot({value}, {factor}, {a})")
            if self.strip == tile.strips - 1:
                start = f"(pn.to(tl.int64) * M + row) * {whole}" + (f" + {first}" if first else "")
                pointer = f"out{out} + {start} + (i[:, None] * {whole} + {k}[None, :])"
                write = self._write(pointer, a, self._mask("m[:, None]", None, (f"{k}[None, :]", rank)))
                where += [f"{k} = tl.arange(0, {padded(rank)})", write]

    def _largest(self, out: int, statement: Statement) -> None:
        """Magnitudes are compared as bits, whose order is theirs: NaN is above infinity, and so it is found."""
        tile, a, value = self.program.tile, f"a{out}", self._for_product(statement[1])
        self._define(a, self.before, [f"{a} = tl.zeros(({self._tile_shape()[0]},), tl.int32)"])
        bits = f"({value}.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32)"
        self.inside.append(f"{a} = tl.maximum({a}, tl.max({bits}, axis=1))")
        if self.strip == tile.strips - 1:
            largest = f"tl.max({a}, axis=0).to(tl.int16).to({_TYPES[self.program.dtype]}, bitcast=True)"
            wide = -(-self.program.columns // tile.columns)
            self.after.append(f"tl.store(out{out} + (pm * {wide} + pn), {largest}.to(tl.float32))")

    def _across(self, out: int, statement: Statement) -> None:
        n, a = self._n, f"a{out}_{self.strip}"
        rank, total = self.program.rank(statement[2]), self.program.columns
        form = factored(self.program, statement)
        value, thin = self._for_product(form.matrix if form else statement[1]), self._thin(statement[2])
        if form and form.rows:
            scaled = " * ".join([f"{thin}.to(tl.float32)", *map(self._value, form.rows)])
            thin = f"s{out}"
            if self.program.experts:  # what rows of nobody are multiplied by may be NaN
                scaled = f"tl.where((m < owned)[:, None], {scaled}, 0.0)"
            self._define(thin, self._fixed(True), [f"{thin} = ({scaled}).to({_TYPES[self.program.dtype]})"])
        zero = f"{a} = tl.zeros(({self._tile_shape()[1]}, {padded(rank)}), tl.float32)"
        self._define(a, self.before if self.down_rows else self.inside, [zero])
        self.inside.append(f"{a} = tl.dot(tl.trans({value}), {thin}, {a})")
        k, last = f"k{out}[None, :]", self.after if self.down_rows else self.inside
        place = f"{n}[:, None] * {rank} + {k}" if statement[3] == "NR" else f"{k} * {total} + {n}[:, None]"
        pointer = f"out{out} + pm.to(tl.int64) * {total * rank} + {place}"
        columns = [f"tl.trans({self._value(index)})" for index in form.columns] if form else []
        write = self._write(pointer, " * ".join([a, *columns]), self._mask(None, f"{n}[:, None]", (k, rank)))
        last += [f"k{out} = tl.arange(0, {padded(rank)})", write]


def source(programs: list[Program]) -> str:
    """The source of the kernel of ``programs``, which share a launch: each has the tiles that follow those before."""
    if len(programs) == 1:
        return _Writer(programs[0]).source()
    names = [Names(program, f"p{k}_") for k, program in enumerate(programs)]
    lines = [*head(programs, names), "    pid = tl.program_id(0)", "    first = 0"]
    for k, (program, each) in enumerate(zip(programs, names)):
        tile, wide = program.tile, -(-program.columns // program.tile.columns)
        lines += [
            f"    last = first + {wide} * ((M + {tile.rows - 1}) // {tile.rows})",
            "    if (pid >= first) & (pid < last):",
            f"        part{k}((pid - first) % {wide}, (pid - first) // {wide}, {', '.join(each.all)})",
            "    first = last",
        ]
    parts = [_Writer(program, f"part{k}").source() for k, program in enumerate(programs)]
    return "\n\n".join([*parts, "\n".join(lines) + "\n"])


@functools.lru_cache(maxsize=1024)
def kernel(text: str) -> Any:
    """The Triton function of the program or programs that ``text`` describes."""
    programs = [program for (program,) in split(text)]
    return define(source(programs), name_of_all(programs), "tile")
