"""Prints an FX graph as text that a person reads and that is the same on every supported torch.

Values are numbered in order (``%3``) and so are symbolic sizes (``s0``), inputs are named by their role, operators lose
their namespace's noise, types are short (``bf16[8, 64]``), and a bar marks the backward half of a joint graph::

    %0 = input                                  f32[4, 64]
    %2 = mm(%0, %1)                             f32[4, 8]
    | %5 = mm(%4, %2)                           f32[8, 64]
    return %2, %5
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes.graph import is_tangent

_SHORT = {
    "float64": "f64",
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float8_e4m3fn": "f8e4m3",
    "float8_e5m2": "f8e5m2",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
    "bool": "b8",
}


def graph_text(graph: Graph) -> str:
    """The graph as text; dead inputs are left out."""
    names: dict[Node, str] = {}
    lines: list[tuple[str, str]] = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append((f"return {_operand(node.args[0], names).removeprefix('[').removesuffix(']')}", ""))
            continue
        if node.op == "placeholder" and not node.users:
            continue
        names[node] = f"%{len(names)}"
        bar = "| " if node.meta.get("partitioner_tag") == "is_backward" else ""
        lines.append((f"{bar}{names[node]} = {_call(node, names)}", type_text(node.meta.get("val"))))
    width = max((len(left) for left, right in lines if right), default=0)
    symbols: dict[str, str] = {}
    return "\n".join(f"{left:<{width}}  {_number_symbols(right, symbols)}".rstrip() for left, right in lines)


def _number_symbols(type_: str, symbols: dict[str, str]) -> str:
    """Rename the symbols in the sizes of a type by their first appearance: s0, s1, ..."""

    def rename(symbol: re.Match[str]) -> str:
        return symbols.setdefault(symbol[0], f"s{len(symbols)}")

    return re.sub(r"\[.*?\]", lambda sizes: re.sub(r"\b[a-z]+\d+\b", rename, sizes[0]), type_)


def _call(node: Node, names: dict[Node, str]) -> str:
    if node.op == "placeholder":
        return "tangent" if is_tangent(node) else "input"
    if node.op == "get_attr":
        return f"attribute {node.target}"
    operands = [_operand(a, names) for a in node.args]
    operands += [f"{name}={_operand(value, names)}" for name, value in node.kwargs.items()]
    return f"{target_name(node.target)}({', '.join(operands)})"


def target_name(target: object) -> str:
    """``mm`` for ``aten.mm.default``, ``lora_fx.accumulate`` for ours, the function's name for a Python function."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return name if namespace in ("aten", "prims") else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))


def _operand(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_operand(item, names) for item in value) + "]"
    if isinstance(value, torch.dtype):
        return _dtype(value)
    if isinstance(value, (torch.device, torch.memory_format)):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch._ops.OpOverload):
        return target_name(value)
    return repr(value)


def type_text(value: Any) -> str:
    """``bf16[8, 64]`` for a tensor, ``[s0]`` for a size, a tuple of those for several, or else the type's name."""
    if isinstance(value, torch.Tensor):
        return f"{_dtype(value.dtype)}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join('None' if item is None else type_text(item) for item in value)})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"[{value}]"
    return "" if value is None else type(value).__name__


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return _SHORT.get(name, name)
