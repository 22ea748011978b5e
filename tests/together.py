"""Inductor's kernels of forward and backward in one call of the C++ compiler.

Most of what the compiler does for a kernel of these tests is the same for each: it reads 150 MB of precompiled headers,
instantiates what they left open, and links. Kernels are therefore compiled when one of them is called, together with
all that wait by then: those of a model's two graphs share a source, with their code as it was and a namespace each, and
a Python module whose functions they are. A kernel that any process has compiled with the same flags is found again in
the folder in which Inductor keeps kernels, as before: a file there says which source has it.

Private names of torch, checked on 2.13. Where the text of its bindings differs, Inductor goes its own way.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache, cache_dir, write_atomic
from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa

Kernel = Callable[..., None]

FUNCTION = "static PyObject* {entry_func}_py("
TABLE = "static PyMethodDef py_methods[]"
ENTRY = '{{"{entry_func}", {entry_func}_py, METH_VARARGS, ""}},'
DEFINITION = re.compile(r'^extern "C"\s+void\s+kernel\(', re.MULTILINE)
INCLUDE = re.compile(r"^\s*#include.*$", re.MULTILINE)

THIS = Path(__file__).read_text()
ALONE = AsyncCompile.cpp_pybinding
"""How torch compiles a kernel."""

LOADED: dict[str, Kernel] = {}
"""By flags, types of arguments and source. What is in here stays loaded, whatever becomes of its file."""


class Pending(NamedTuple):
    """Stands for a kernel in the module of a graph until all of that is read."""

    argtypes: tuple[str, ...]
    source: str

    def key(self, flags: str) -> str:
        """What it is found by: nothing of another torch, or of this file as it was, is."""
        parts = CppPythonBindingsCodeCache.suffix_template
        return hashlib.sha256(repr((torch.__version__, parts, THIS, flags, *self)).encode()).hexdigest()


class Awaited:
    """Stands for a kernel that no process has compiled until it, or another that waits with it, is called."""

    def __init__(self, kernel: Pending, key: str, flags: str) -> None:
        self.kernel, self.key, self.flags = kernel, key, flags

    def __call__(self, *arguments: Any) -> None:
        if self.key not in LOADED:
            compile_with_all_that_wait(self.flags)
        LOADED[self.key](*arguments)


WAITING: dict[str, Awaited] = {}
"""By the same as `LOADED`."""


def compile_kernels_of_a_graph_together() -> None:
    parts = CppPythonBindingsCodeCache.suffix_template
    if not all(parts.count(part) == 1 for part in (FUNCTION, TABLE, ENTRY)):
        warnings.warn("Inductor's bindings have changed: each kernel is compiled by itself", stacklevel=2)
        return
    wait = AsyncCompile.wait

    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
        if len(DEFINITION.findall(source_code)) == 1:
            return Pending(tuple(argtypes), source_code)
        return ALONE(self, argtypes, source_code)

    def wait_for_all(self: AsyncCompile, scope: dict[str, Any]) -> None:
        pending = {name: value for name, value in scope.items() if isinstance(value, Pending)}
        if pending:
            flags = compiler_flags()
            scope.update({name: found_or_awaited(value, flags) for name, value in pending.items()})
        wait(self, scope)

    AsyncCompile.cpp_pybinding = cpp_pybinding  # type: ignore[method-assign]
    AsyncCompile.wait = wait_for_all  # type: ignore[method-assign]


def compiler_flags() -> str:
    options = CppTorchDeviceOptions(
        vec_isa=pick_vec_isa(), device_type="cpu", **CppPythonBindingsCodeCache.cpp_compile_command_flags
    )
    return CppBuilder(name="o", sources="i", BuildOption=options).get_command_line()


def found_or_awaited(kernel: Pending, flags: str) -> Kernel:
    key = kernel.key(flags)
    if key not in LOADED:
        try:
            number, _, source = (folder() / key).read_text().partition("\n")
        except FileNotFoundError:
            return WAITING.setdefault(key, Awaited(kernel, key, flags))
        LOADED[key] = getattr(CppPythonBindingsCodeCache.load(source), f"kernel{number}")
    return LOADED[key]


def compile_with_all_that_wait(flags: str) -> None:
    assert flags == compiler_flags(), "these options of the C++ compiler are no longer set when the kernel is called"
    new = {key: awaited.kernel for key, awaited in WAITING.items() if awaited.flags == flags}
    source = together(list(new.values()))
    module = CppPythonBindingsCodeCache.load(source)
    for i, key in enumerate(new):
        LOADED[key] = getattr(module, f"kernel{i}")
        del WAITING[key]  # and not before: where the compiler fails, the next call is to say so again
        write_atomic(str(folder() / key), f"{i}\n{source}", make_dirs=True)


def folder() -> Path:
    return Path(cache_dir()) / "together"


def together(kernels: Sequence[Pending]) -> str:
    """One source with `kernels` as kernel0, kernel1, and so on, and Inductor's own bindings of each."""
    before, rest = CppPythonBindingsCodeCache.suffix_template.split(FUNCTION)
    function, table = rest.split(TABLE)
    includes: dict[str, None] = {}
    code, bindings, entries = [], [], []
    for i, (argtypes, source) in enumerate(kernels):
        includes.update(dict.fromkeys(line.strip() for line in INCLUDE.findall(source)))
        body = DEFINITION.sub(f'extern "C" void kernel{i}(', INCLUDE.sub("", source))
        code.append(f"namespace of_kernel{i} {{\n{body}\n}}\nusing of_kernel{i}::kernel{i};\n")
        arguments = ", ".join(f"parse_arg<{t.replace('const ', '')}>(args, {n})" for n, t in enumerate(argtypes))
        names = {"entry_func": f"kernel{i}", "arg_len": len(argtypes)}
        call = f"kernel{i}({arguments}); Py_RETURN_NONE;"
        bindings.append((FUNCTION + function).format(**names, call_entry_func=call))
        entries.append(ENTRY.format(**names))
    names = {"entry_func": "kernel", "extra_parse_arg": ""}
    module = (TABLE + table).format(**names).replace(ENTRY.format(**names), "\n".join(entries))
    return "\n".join([*includes, *code, before.format(**names), *bindings, module])
