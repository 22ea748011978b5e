"""The products of a thin matrix on a CPU, by the kernels of ``thin.cpp``.

A matrix library runs h = x A^T, y += s h B^T and their gradients at half of a CPU's speed or less: one size of each is
the rank. (Not of bfloat16 where it has AMX, nor of float16 where it has AVX512-FP16: those are left to it.) Each
function here does its product when the shapes are thin and the layout is one that the kernels read, and says so; else
it does nothing, and the caller uses ATen. The kernels are compiled at their first use, by the compiler that Inductor
needs anyway, into Inductor's cache. Where that fails, it is logged once and ATen does it all.

Legend: M tokens, K in, N out, R rank.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fx.passes._torch import compile_cpp

log = logging.getLogger("lora_fx.passes")

# Inductor's own flags forbid fused multiply-adds.
FLAGS = ("-ffp-contract=fast",)
SOURCE = Path(__file__).with_name("thin.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

FASTER = {torch.bfloat16: "amx_bf16", torch.float16: "avx512_fp16"}
"""Instructions with which oneDNN's products of a type, thin ones as well, leave the kernels here behind."""

MIN_WORK = 1 << 20
"""Multiplications below which a call of the library, a few microseconds, is all that a product costs."""

_WORK_OF_A_THREAD = 1 << 18

_pointer, _size, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_matrix = (_pointer, _size, _size)  # address, and the strides of rows and columns
_SIGNATURES = {
    "lora_fx_max_rank": (_int,),
    "lora_fx_product": (_int, _size, _size, _size, *_matrix, *_matrix, _pointer, _size, _float, _int, _int),
    "lora_fx_gradient": (
        *(_int, _size, _size, _size, _pointer, _size, *_matrix, *_matrix, _pointer, _size, *_matrix, _float, _int),
    ),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with the reason in the log, where they cannot be built."""
    try:
        # The compiler builds for the machine that it runs on, and a cache folder may be shared by several.
        return declare(compile_cpp(f"{SOURCE.read_text()}\n// {_processor()}\n", FLAGS))
    except Exception as error:
        text = "The CPU kernels of lora_fx (%s) could not be built; ATen's products, slower ones, take their place: %s"
        log.warning(text, SOURCE.name, f"{type(error).__name__}: {error}")
        return None


def declare(built: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the signatures of ``thin.cpp``."""
    for name, arguments in _SIGNATURES.items():
        function = getattr(built, name)
        function.argtypes, function.restype = arguments, _int
    return built


def _processor() -> str:
    """What tells CPUs with different instructions apart."""
    return f"{platform.machine()} {hashlib.sha256(_features().encode()).hexdigest()}"


def _features() -> str:
    """The instructions that the CPU has, as Linux calls them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


@functools.cache
def has_faster_products(dtype: torch.dtype) -> bool:
    """Whether the matrix library multiplies this type with instructions that the kernels here do not use: whether torch
    was built with it, and not whether it is switched off just now.

    Microseconds of the kernels and of oneDNN (M 2048, K and N 1024, R 16, two cores of a Xeon with both), by a script
    that is not kept; what a step takes is ``examples/benchmarks/cpu.py``'s::

                h = x A^T      y += s h B^T    g and dB       dA
        bfloat16    495  88        345  210        981  370       366  208
        float16     589  339       339  324       1025  754       489  343
    """
    needed = FASTER.get(dtype)
    return needed is not None and torch.backends.mkldnn.is_available() and needed in _features().split()


@functools.cache
def max_rank(dtype: torch.dtype) -> int:
    """The largest rank (or stack of ranks) of this type that the kernels are for; 0 for none."""
    built = library() if dtype in TYPES and not has_faster_products(dtype) else None
    return int(built.lora_fx_max_rank(TYPES[dtype])) if built is not None else 0


def is_thin(dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether [m, k] @ [k, n] has a thin side and is large enough to be worth a call."""
    return m * n * k >= MIN_WORK and min(m, n, k) <= max_rank(dtype)


def scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor | None:
    """``scale * a @ b``: a [m, k], b [k, n]; None when it is not for these kernels."""
    (m, k), n = a.shape, b.shape[1]
    if a.dtype != b.dtype or not is_thin(a.dtype, m, n, k):
        return None
    thin = max_rank(a.dtype)
    if k <= thin or (n <= thin and a.stride(1) == 1):
        out = a.new_empty(m, n)
        _product(a, b, out, scale, accumulate=False)
    elif n <= thin and a.stride(0) == 1:
        out = a.new_empty(m, n)
        _gradient(a.t(), None, b, None, out, scale)
    elif m <= thin and b.stride(1) == 1:
        out = a.new_empty(m, n)
        _gradient(b, None, a.t(), None, out.t(), scale)
    else:
        return None
    return out


def accumulate(base: Tensor, a: Tensor, b: Tensor, scale: float) -> bool:
    """``base += scale * a @ b``: base [m, n], a [m, k], b [k, n]; False, and nothing done, when it is not for these."""
    (m, k), n = a.shape, b.shape[1]
    writable = base.stride(1) == 1 and base.stride(0) >= n
    fits = writable and base.dtype == a.dtype == b.dtype and is_thin(a.dtype, m, n, k) and k <= max_rank(a.dtype)
    if not fits:
        return False
    _product(a, b, base, scale, accumulate=True)
    return True


def gradient_pair(dy: Tensor, b: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """``(scale * dy @ b, scale * dy.T @ h)`` in one read of dy: dy [M, N], b [N, R], h [M, R]."""
    (m, n), r = dy.shape, b.shape[1]
    fits = dy.stride(1) == 1 and dy.dtype == b.dtype == h.dtype and is_thin(dy.dtype, m, n, r)
    if not (fits and r <= max_rank(dy.dtype)):
        return None
    grad_h, grad_b = dy.new_empty(m, r), dy.new_empty(n, r)
    _gradient(dy, b, h, grad_h, grad_b, scale)
    return grad_h, grad_b


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float, *, accumulate: bool) -> None:
    (m, k), n = a.shape, b.shape[1]
    _call(
        "lora_fx_product",
        *(TYPES[a.dtype], m, n, k),
        *(a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), out.data_ptr(), out.stride(0)),
        *(scale, accumulate, _threads(m * n * k)),
    )


def _gradient(x: Tensor, b: Tensor | None, h: Tensor, g: Tensor | None, d: Tensor, scale: float) -> None:
    (m, n), r = x.shape, h.shape[1]
    _call(
        "lora_fx_gradient",
        *(TYPES[x.dtype], m, n, r, x.data_ptr(), x.stride(0)),
        *((None, 0, 0) if b is None else (b.data_ptr(), *b.stride())),
        *(h.data_ptr(), *h.stride()),
        *((None, 0) if g is None else (g.data_ptr(), g.stride(0))),
        *(d.data_ptr(), *d.stride(), scale, _threads(m * n * r)),
    )


def _call(name: str, *arguments: Any) -> None:
    status = getattr(library(), name)(*arguments)
    assert status == 0, f"{name}{arguments} gave {status}"


def _threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), work // _WORK_OF_A_THREAD))
