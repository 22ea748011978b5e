"""What one kernel does in one pass over a matrix: a small program, as data.

A LoRA branch on a GPU is bound by memory: every product of rank R that it adds reads or writes something of the
activations' size. So everything that touches one [M, N] value (the products of rank R that are added to it, the
pointwise operations that it goes through, the products of rank R that read it) becomes one program that walks over the
value in tiles and never puts an intermediate into memory. :mod:`lora_fx.passes.tile_regions` cuts programs out of
graphs, :mod:`lora_fx.passes.kernels.tile_triton` makes kernels of them, and :func:`evaluate` here says what they mean.

A program is a list of statements; a statement's value is named by its place in the list::

    ["load", input]                   a value of the pass, [M, N]; rows [M, 1], columns [N] and numbers broadcast
    ["keep", seed, p]                 1 where dropout keeps an element, else 0: :mod:`lora_fx.passes.kernels.dropout`
    ["product", thin, factor, scale]  [M, R] times [R, N], times a number (or null, or a list of two): the up-projection
                                      of a branch
    ["op", name, [operand, ...]]      pointwise; an operand is a place in the list, or [number] for a constant
    ["store", value, dtype]           an output [M, N]
    ["down", value, factor]           an output: value [M, N] times [N, R], in parts [ceil(N / columns), M, R], or
                                      whole [M, R], in the program's dtype, where a tile has all columns
    ["across", value, thin, order]    an output: value^T [N, M] times [M, R], in parts [ceil(M / rows), N, R] for the
                                      order "NR", [ceil(M / rows), R, N] for "RN"

    ["largest", value]                an output: the largest magnitude of each tile, [ceil(M / rows), ceil(N / columns)]

Parts are float32 and are summed by whoever reads them: in a fixed order and without atomics, so that two runs are equal
to the bit. Pointwise arithmetic is float32; the operands of products have the dtype of the program. A factor may be a
list of several inputs [R, N], side by side: a stack of siblings that is nowhere in memory.

A program of experts has rows that are sorted by expert, as ``ends`` says, and factors that are stacks with a matrix for
each. Its tiles begin anew where an expert's rows do, so that one matrix is right for all of a tile, and its parts of a
sum over rows are those of one expert each. Rows behind the last end are nobody's: they have tiles, in which what
products multiply is zero, and which no sum contains. What torch's grouped products leave there is unspecified, and so
is what is computed from it: a program that stores nothing else writes nothing there but zeros for its sums.

Several programs over the same rows, none of which needs what another makes, may be one launch (:func:`join`).

Legend: M tokens, N the columns of the pass, R rank.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fx.passes._torch import ceil_div
from lora_fx.passes.kernels import dropout

Statement = list[Any]

OUTPUTS = ("store", "down", "across", "largest")


@dataclass(frozen=True)
class Tile:
    """How a kernel walks: a program (in the GPU's sense) takes ``rows`` x ``columns``, in steps of one of the two."""

    rows: int
    columns: int
    step: int
    """Rows (or, for ``walk == "columns"``, columns) in one step; divides what it walks along."""
    walk: str
    """``"rows"``: down its rows, which keeps sums over rows in registers; ``"columns"``: the other way."""
    strips: int = 1
    """Parts of a step of rows, side by side, that are computed one after the other: smaller tiles, fewer parts."""
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        along = self.rows if self.walk == "rows" else self.columns
        if self.walk not in ("rows", "columns") or along % self.step or self.columns % self.strips:
            raise ValueError(f"{self} does not divide into its steps and strips")
        if self.walk == "columns" and self.strips != 1:
            raise ValueError(f"{self} walks along its columns: steps are its strips there")


@dataclass(frozen=True)
class Program:
    """One pass over [M, N]."""

    columns: int
    """N."""
    dtype: str
    """Of the matrices that products multiply: ``bfloat16`` or ``float16``."""
    inputs: list[list[Any]]
    """What each input is: ``["full"]`` [..., N] (``["full", "wide"]`` of more than 16 bits, ``["full", "grouped"]`` a
    grouped product), ``["row"]`` [..., 1], ``["column"]`` [N], ``["number"]`` [], ``["seed"]`` [], ``["thin", R]``
    [M, R], or parts that it is the sum of, ``["parts", R, P, start, all]``: columns from ``start`` on of [P, M, all] in
    float32; ``["factor", R, order]`` [N, R] for the order ``"NR"``, [R, N] for ``"RN"``, and of E experts
    ``["factor", R, order, E]``, a stack of those; ``["ends", E]`` [E] in int32, where each expert's rows end."""
    body: list[Statement]
    tile: Tile

    def dumps(self) -> str:
        """As text, the same for equal programs."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @property
    def outputs(self) -> list[Statement]:
        """The statements that make an output, in the order of the outputs."""
        return [statement for statement in self.body if statement[0] in OUTPUTS]

    def is_whole(self, statement: Statement) -> bool:
        """Whether an output comes as it is and not in parts."""
        return statement[0] == "store" or (statement[0] == "down" and self.tile.columns >= self.columns)

    @property
    def sums_both_ways(self) -> bool:
        """Whether it sums over columns and over rows."""
        return {"down", "across"} <= {statement[0] for statement in self.body}

    @property
    def experts(self) -> int:
        """E, or 0 where rows are not sorted by expert."""
        return next((int(kind[1]) for kind in self.inputs if kind[0] == "ends"), 0)

    @property
    def leaves_nobodys_rows(self) -> bool:
        """Whether whatever it stores in rows of nobody is computed from what grouped products leave there."""
        unspecified: set[int] = set()
        for place, (kind, what, *rest) in enumerate(self.body):
            loaded = kind == "load" and "grouped" in self.inputs[what]
            # A choice may be of something else.
            if loaded or (kind == "op" and what != "where" and unspecified & {*_places(rest[0])}):
                unspecified.add(place)
        return bool(self.experts) and all(s[1] in unspecified for s in self.outputs if s[0] in ("store", "largest"))

    def rank(self, index: int | list[int]) -> int:
        """R of a thin or factor input, or of several side by side."""
        return sum(int(self.inputs[i][1]) for i in (index if isinstance(index, list) else [index]))

    def output_shape(self, statement: Statement, rows: Any, parts: Any) -> tuple[tuple[Any, ...], torch.dtype]:
        """Shape and dtype of an output for ``rows`` = M and :meth:`row_parts`. A stored value is a matrix."""
        kind = statement[0]
        if kind == "store":
            return (rows, self.columns), getattr(torch, statement[2])
        if kind == "largest":
            return (parts, -(-self.columns // self.tile.columns)), torch.float32
        r = self.rank(statement[2])
        if self.is_whole(statement):
            return (rows, r), getattr(torch, self.dtype)
        if kind == "down":
            return (-(-self.columns // self.tile.columns), rows, r), torch.float32
        sizes = (self.columns, r) if statement[3] == "NR" else (r, self.columns)
        return (parts, *sizes), torch.float32

    def row_parts(self, rows: Any) -> Any:
        """Tiles along M = ``rows``: the parts of a sum over rows.

        Of experts as many as there may be, for the last tile of each may not be full. Those that are not needed have no
        rows.
        """
        return ceil_div(rows, self.tile.rows) + self.experts

    def row_count(self, inputs: list[Tensor]) -> Any:
        """M, as the inputs have it."""
        for kind, tensor in zip(self.inputs, inputs):
            if kind[0] == "full":
                return tensor.numel() // self.columns
            if kind[0] in ("thin", "parts"):
                return tensor.shape[-2]
        raise AssertionError("a program reads something that has rows")


def _places(operands: list[Any]) -> list[int]:
    """The operands of a pointwise operation that are values, and not constants."""
    return [operand for operand in operands if isinstance(operand, int)]


def loads(text: str) -> Program:
    """The program that :meth:`Program.dumps` wrote."""
    (program,) = _loaded(text)
    return program


@functools.lru_cache(maxsize=1024)
def _loaded(text: str) -> tuple[Program, ...]:
    """The programs of a text, one or several."""
    found = json.loads(text)
    each = found if isinstance(found, list) else [found]
    return tuple(Program(**{**fields, "tile": Tile(**fields["tile"])}) for fields in each)


def join(texts: list[str]) -> str:
    """Programs as one text: one launch, whose inputs and outputs are those of the first, then those of the next.

    It is one line: Inductor writes the arguments of a graph's nodes into a comment above the kernels that read them.
    """
    return texts[0] if len(texts) == 1 else f"[{','.join(text.removeprefix('[').removesuffix(']') for text in texts)}]"


def split(text: str, *operands: list[Any]) -> list[tuple[Any, ...]]:
    """The programs of a text, each with its part of every list in ``operands``: the inputs, the outputs, or both.

    Args:
        text: what :meth:`Program.dumps` or :func:`join` gave.
        operands: the inputs of all programs, or those and the outputs.
    """
    found, starts = [], [0] * len(operands)
    for program in _loaded(text):
        counts = (len(program.inputs), len(program.outputs))
        found.append((program, *(o[s : s + n] for o, s, n in zip(operands, starts, counts))))
        starts = [s + n for s, n in zip(starts, counts)]
    return found


Pointwise = Callable[..., Tensor]

POINTWISE: dict[str, Pointwise] = {
    "identity": lambda x: x,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "relu": torch.relu,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
    "where": lambda condition, x, y: torch.where(condition != 0, x, y),
}
"""What each pointwise name means, on float32 tensors. A condition is computed, or loaded as 0 and 1."""


def evaluate(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    """What a program computes, as ATen: the form that runs everywhere, and the one that kernels are compared with.

    The parts of an output are one part here, followed by zeros: their number belongs to the shape. Of experts each has
    one, where its parts begin.
    """
    m, dtype, wide = program.row_count(inputs), getattr(torch, program.dtype), torch.float32
    owned, first_part = _owners(program, inputs, m)
    matrices = [_as_matrix(kind, t, program.columns) for kind, t in zip(program.inputs, inputs)]
    values: list[Any] = []
    results: list[Tensor] = []
    for statement in program.body:
        kind = statement[0]
        value = None
        if kind == "load":
            value = matrices[statement[1]].to(wide)
        elif kind == "keep":
            value = dropout.keep_eager(inputs[statement[1]], (m, program.columns), statement[2]).to(wide)
        elif kind == "product":
            thin, factor = (_matrix(matrices, i) for i in statement[1:3])
            value = _product(thin.to(dtype).to(wide), factor.to(wide).mT, owned)
            for scale in numbers(statement[3]):
                value = value * matrices[scale]
        elif kind == "op":
            operands = [_constant(o[0], inputs[0]) if isinstance(o, list) else values[o] for o in statement[2]]
            value = POINTWISE[statement[1]](*operands)
        else:
            shape, out_dtype = program.output_shape(statement, m, program.row_parts(m))
            full = values[statement[1]].expand(m, program.columns)
            if kind == "store":
                results.append(full.to(out_dtype).contiguous())
            elif kind == "largest":
                found = full.new_zeros(shape, dtype=out_dtype)
                if len(found):
                    found[0, 0] = full.to(dtype).abs().amax()
                results.append(found)
            else:
                full = full.to(dtype).to(wide)
                other = _matrix(matrices, statement[2]).to(dtype).to(wide)
                if kind == "down":
                    total = _product(full, other, owned)
                else:
                    total = full.t() @ other if owned is None else _sums(full, other, owned)
                    total = total.mT if statement[3] == "RN" else total
                if program.is_whole(statement):
                    results.append(total.to(out_dtype))
                    values.append(None)
                    continue
                parts = total.new_zeros(shape, dtype=out_dtype)
                if kind == "across" and first_part is not None:
                    parts.index_add_(0, first_part, total)
                elif len(parts):  # M = 0 has none
                    parts[0] = total
                results.append(parts)
        values.append(value)
    return results


def _owners(program: Program, inputs: list[Tensor], rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Of experts, which rows each has [E, M, 1], and the first part of its sums over rows [E]."""
    ends = next((t for kind, t in zip(program.inputs, inputs) if kind[0] == "ends"), None)
    if ends is None:
        return None, None
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    row = torch.arange(rows, device=ends.device)
    parts = (ends - starts + program.tile.rows - 1) // program.tile.rows
    return ((row >= starts[:, None]) & (row < ends[:, None])).unsqueeze(-1), parts.cumsum(0) - parts


# Expert by expert: all at once would take as many times the memory.


def _product(rows: Tensor, matrices: Tensor, owned: Tensor | None) -> Tensor:
    """Rows times a matrix, or each times its expert's, with zeros where it is nobody's."""
    if owned is None:
        return rows @ matrices
    total = rows.new_zeros(rows.shape[0], matrices.shape[-1])
    for matrix, own in zip(matrices, owned):
        total = torch.where(own, rows @ matrix, total)
    return total


def _sums(left: Tensor, right: Tensor, owned: Tensor) -> Tensor:
    """left^T @ right over each expert's rows, whatever is in the others: [E, N, R]."""
    pairs = ((torch.where(own, left, 0.0), torch.where(own, right, 0.0)) for own in owned)
    return torch.stack([a.t() @ b for a, b in pairs])


def _constant(number: float, like: Tensor) -> Tensor:
    return torch.tensor(number, dtype=torch.float32, device=like.device)


def numbers(scale: int | list[int] | None) -> list[int]:
    """The inputs that a product is scaled by."""
    return scale if isinstance(scale, list) else [] if scale is None else [scale]


def _matrix(matrices: list[Tensor], index: int | list[int]) -> Tensor:
    return torch.cat([matrices[i] for i in index], dim=1) if isinstance(index, list) else matrices[index]


def _as_matrix(kind: list[Any], tensor: Tensor, columns: int) -> Tensor:
    """An input as a matrix that broadcasts against [M, N]; a factor as [N, R]."""
    if kind[0] == "full":
        return tensor.reshape(-1, columns)
    if kind[0] == "row":
        return tensor.reshape(-1, 1)
    if kind[0] == "column":
        return tensor.reshape(1, columns)
    if kind[0] == "parts":
        return tensor[..., kind[3] : kind[3] + kind[1]].sum(0)
    return tensor.mT if kind[0] == "factor" and kind[2] == "RN" else tensor
