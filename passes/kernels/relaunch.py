"""Launch kernels again without asking Triton which ones they are.

Triton binds the arguments of a launch, sorts them into types and looks up what it compiled for those, which takes the
CPU longer than many a kernel takes the GPU; a Llama block has 50 launches. What there is to find out depends on the
types and layouts of a few tensors, so it is found out once for each of those.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

_MOST = 4096
"""Launches that are remembered. With dynamic shapes there is no end to them: all are forgotten now and then."""


def described(tensors: Sequence[Tensor]) -> Hashable:
    """All that decides which kernel Triton launches on ``tensors``, and with which numbers: it looks at alignment."""
    return tensors[0].device, *[(t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors]


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid and all its arguments but the tensors."""

    run: Callable[..., Any]
    arguments: list[Any]
    tensors: list[tuple[int, int]]
    """Which argument is which of the tensors that it is launched on."""

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        arguments = self.arguments.copy()
        for place, index in self.tensors:
            arguments[place] = tensors[index]
        self.run(*arguments)


class Launches:
    """Those of one kind of kernel, by a key that holds what :func:`described` says of their tensors."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Launch] = {}

    def find(self, key: Hashable) -> Launch | None:
        """The launch for tensors like these, if one was kept."""
        return self.known.get(key)

    def keep(
        self,
        key: Hashable,
        function: Any,
        compiled: Any,
        grid: tuple[int, ...],
        positional: Sequence[Any],
        named: dict[str, Any],
        tensors: Sequence[Tensor],
    ) -> None:
        """Remember what Triton launched: ``compiled``, for a ``function`` with these arguments.

        Those of ``positional`` that are tensors are ``tensors`` in their order, as the kernel indexes them. (By their
        order and not by their memory, which two of them may share in one launch and not in the next.)
        Nothing is kept where one is a copy that was made for this launch, or nothing was compiled (Triton's
        interpreter).
        """
        if not isinstance(compiled, CompiledKernel) or torch.version.hip:  # AMD's compiler looks at more than alignment
            return
        given = iter(positional)
        arguments = [named[name] if name in named else next(given) for name in function.arg_names]
        places: list[tuple[int, int]] = []
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                if argument.data_ptr() != tensors[len(places)].data_ptr():
                    return
                places.append((place, len(places)))
                arguments[place] = None
        assert len(places) == len(tensors)
        if len(self.known) >= _MOST:
            self.known.clear()
        self.known[key] = Launch(compiled[(*grid, 1, 1)[:3]], arguments, places)
