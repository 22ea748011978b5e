"""Which submodules' weights a module class reads in its forward, instead of calling them: found in its source.

    def forward(self, x):
        return F.linear(self.up(x), self.down.weight)      # down.weight is read: an adapter on `down` would never run

It is a question that only the source can answer before the first batch, and models in wide use do this (the attention
of WavLM, the time-step projection of Mamba). What cannot be seen here (source that is not there, a local name for the
submodule, names made at run time) counts as not read.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

# What may be asked of a weight without multiplying anything by it: its metadata, and statistics of its values.
_METADATA = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "layout", "itemsize", "nbytes", "element_size"}
_FLAGS = {"requires_grad", "grad", "data", "is_cuda", "is_meta", "is_quantized", "is_floating_point", "is_complex"}
_STATISTICS = {"norm", "abs", "square", "pow", "sum", "mean", "std", "var", "min", "max", "amax"}
_HARMLESS = _METADATA | _FLAGS | _STATISTICS
_HARMLESS_CALLS = {"isinstance", "hasattr", "getattr"}


@dataclass(frozen=True)
class Read:
    """A place where the weight of a submodule is read."""

    method: str
    file: str
    line: int


def weights_read(cls: type, weight: str = "weight") -> Mapping[str, Read]:
    """Dotted name below `self` -> where its ``.weight`` is used, in ``cls.forward`` and the methods that it reaches.

    Used means: an operand of ``@``, an argument beside another that is no constant, indexed, or the start of an
    expression on its values. ``self.wo.weight.dtype`` and ``self.norm(self.fc.weight)`` are not. torch's own classes
    are left out: `lora_fx.bypass` lists them. `weight` is the name of the parameter to look for.
    """
    return _weights_read(cast(Hashable, cls), weight)


@functools.cache
def _weights_read(cls: Any, weight: str) -> Mapping[str, Read]:
    found: dict[str, Read] = {}
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        function = inspect.unwrap(getattr(cls, name, None) or (lambda: None))
        parsed = _parse(function)
        if parsed is None:
            continue
        tree, file, first = parsed
        for submodule, line in _reads(tree, f".{weight}"):
            found.setdefault(submodule, Read(f"{cls.__name__}.{name}", file, first + line - 1))
        for called in _methods_called(tree):
            if called not in seen and inspect.isfunction(getattr(cls, called, None)):
                seen.add(called)
                waiting.append(called)
    return found


def _parse(function: Any) -> tuple[ast.AST, str, int] | None:
    module = getattr(function, "__module__", None) or ""
    if not inspect.isfunction(function) or module == "torch" or module.startswith("torch."):
        return None
    try:
        lines, first = inspect.getsourcelines(function)
        return ast.parse(textwrap.dedent("".join(lines))), inspect.getsourcefile(function) or "?", first
    except (OSError, SyntaxError, TypeError):
        return None


def _reads(tree: ast.AST, end: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        used: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            used = [node.left, node.right]
        elif isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            harmless = isinstance(node.func, ast.Name) and node.func.id in _HARMLESS_CALLS
            if not harmless and sum(not isinstance(argument, ast.Constant) for argument in arguments) > 1:
                used = arguments
        elif isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr not in _HARMLESS):
            used = [node.value]
        for expression in used:
            path = _below_self(expression)
            if path is not None and path.endswith(end):
                yield path.removesuffix(end), expression.lineno


def _methods_called(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        path = _below_self(node.func) if isinstance(node, ast.Call) else None
        if path is not None and "." not in path:
            yield path


def _below_self(node: ast.AST) -> str | None:
    """``"a.b"`` for the expression ``self.a.b``, None for any other."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if names and isinstance(node, ast.Name) and node.id == "self" else None
