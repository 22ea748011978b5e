"""An expert weight with its adapter: ``W + s B A`` as something that multiplies activations and is never formed.

    x @ weight            x @ W + s (x @ left) @ right          where weight = W + s left @ right, left [..., P, R]
    F.linear(x, weight)   F.linear(x, W) + s F.linear(F.linear(x, right), left)
    weight @ x            W @ x + s left @ (right @ x)
    grouped_mm(x, weight, offs=ends)                            as the first, with the same ends for all three products

What comes before the product (transposing, taking one expert or several, casting, cutting gate from up) is done to W
and to the factors alike, so the forward of an experts module runs as it was written. Whatever else is asked of the
weight would need the sum: that is a TypeError, and never ignored.
"""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx._torch import annotate
from lora_fx.passes.graph import PARAMETER
from lora_fx.passes.low_rank import low_rank

_GROUPED = (F.grouped_mm, torch._grouped_mm)
_MATMULS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
# What transformers calls where torch's grouped product cannot be compiled: (x, weight, ends).
_GROUPED_ELSEWHERE = "grouped_mm_fallback"
# The grouped kernels of GPUs want rows that start at multiples of this many bytes.
_ALIGNMENT = 16


class AdaptedWeight:
    """``base + scale * left @ right`` in place of a weight, inside the forward of the module that holds it.

    Args:
        base: [..., P, Q].
        left: [..., P, R].
        right: [..., R, Q].
        scale: 0-d.
        dropout: probability that an element of what is multiplied is dropped, in the low-rank branch alone.
        path: the name of the weight, for messages and reports.
    """

    def __init__(self, base: Tensor, left: Tensor, right: Tensor, scale: Tensor, dropout: float, path: str) -> None:
        self.base, self.left, self.right = base, left, right
        self.scale, self.dropout, self.path = scale, dropout, path

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """The products; Dynamo and eager torch both come here."""
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and isinstance(args[1], cls) and isinstance(args[0], Tensor):
            x, weight, *bias = args
            base = func(x, weight.base, *bias, **kwargs)
            return weight._plus(base, x, weight.right, weight.left, F.linear)
        if func in _MATMULS and not kwargs:
            left, right = args
            if isinstance(left, Tensor):
                return right._plus(func(left, right.base), left, right.left, right.right, func)
            if isinstance(right, Tensor):
                base = func(left.base, right)
                return left._plus(base, right, left.right, left.left, lambda x, factor: func(factor, x))
        if func in _GROUPED and len(args) >= 2 and isinstance(args[1], cls) and isinstance(args[0], Tensor):
            x, weight, *ends = args
            return weight._grouped(func, x, *ends, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == _GROUPED_ELSEWHERE:
            return _grouped_elsewhere(func, *args, **kwargs)
        operands = [*args, *kwargs.values()]
        operands += [item for several in operands if isinstance(several, (list, tuple)) for item in several]
        return next(operand for operand in operands if isinstance(operand, cls))._refuse(name)

    def _plus(
        self, base: Tensor, x: Tensor, first: Tensor, second: Tensor, product: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        with annotate({PARAMETER: self.path}):
            update = low_rank(x, first, second, self.scale, self.dropout, True, product)
            return base + update.to(base.dtype)

    def _grouped(
        self, func: Any, x: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
    ) -> Tensor:
        base = func(x, self.base, offs=offs, bias=bias, out_dtype=out_dtype)
        left, right = self.left, self.right
        if missing := -left.shape[-1] % (_ALIGNMENT // x.dtype.itemsize):
            left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
        return self._plus(base, x, left, right, lambda x, factor: func(x, factor, offs=offs))

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"{self.path} has an adapter, and its module's forward asks for {what!r}, which needs the sum of the two: "
            f"only products with activations are computed without it. Leave it out of target_parameters"
        )

    # ---- what is done to all three alike ---------------------------------------------------------------------------

    def _like(self, base: Tensor, left: Tensor, right: Tensor) -> "AdaptedWeight":
        return AdaptedWeight(base, left, right, self.scale, self.dropout, self.path)

    def _all(self, change: Callable[[Tensor], Tensor]) -> "AdaptedWeight":
        return self._like(change(self.base), change(self.left), change(self.right))

    def transpose(self, dim0: int, dim1: int) -> "AdaptedWeight":
        """Of the last two dimensions."""
        if {dim0 % self.ndim, dim1 % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            self._refuse(f"transpose({dim0}, {dim1})")
        return self._like(self.base.mT, self.right.mT, self.left.mT)

    @property
    def mT(self) -> "AdaptedWeight":  # torch's name
        return self.transpose(-2, -1)

    def t(self) -> "AdaptedWeight":
        """Of a single expert's matrix."""
        if self.ndim != 2:
            self._refuse("t()")
        return self.transpose(0, 1)

    @property
    def T(self) -> "AdaptedWeight":  # torch's name
        return self.t()

    def __getitem__(self, index: Any) -> "AdaptedWeight":
        """One expert, or several."""
        if self.ndim != 3 or isinstance(index, tuple) or index is None or index is Ellipsis:
            self._refuse(f"[{index}]")
        return self._all(lambda tensor: tensor[index])

    def __len__(self) -> int:
        return len(self.base)

    def unbind(self, dim: int = 0) -> tuple["AdaptedWeight", ...]:
        """The experts, one by one."""
        if self.ndim != 3 or dim not in (0, -3):
            self._refuse(f"unbind({dim})")
        parts = zip(self.base.unbind(0), self.left.unbind(0), self.right.unbind(0))
        return tuple(self._like(*three) for three in parts)

    def __iter__(self) -> Iterator["AdaptedWeight"]:
        return iter(self.unbind())

    def chunk(self, chunks: int, dim: int = 0) -> tuple["AdaptedWeight", ...]:
        """Equal parts of the experts' rows or columns."""
        return self._cut(lambda tensor: tensor.chunk(chunks, dim), dim)

    def split(self, size: Any, dim: int = 0) -> tuple["AdaptedWeight", ...]:
        """Parts of the experts' rows or columns of these sizes."""
        return self._cut(lambda tensor: tensor.split(size, dim), dim)

    def _cut(self, cut: Callable[[Tensor], Any], dim: int) -> tuple["AdaptedWeight", ...]:
        dim %= self.ndim
        bases = cut(self.base)
        if dim == self.ndim - 2:
            return tuple(self._like(base, left, self.right) for base, left in zip(bases, cut(self.left)))
        if dim == self.ndim - 1:
            return tuple(self._like(base, self.left, right) for base, right in zip(bases, cut(self.right)))
        return tuple(self._like(*three) for three in zip(bases, cut(self.left), cut(self.right)))

    def to(self, *args: Any, **kwargs: Any) -> "AdaptedWeight":
        """As `Tensor.to`."""
        return self._all(lambda tensor: tensor.to(*args, **kwargs))

    def bfloat16(self) -> "AdaptedWeight":
        return self.to(torch.bfloat16)

    def half(self) -> "AdaptedWeight":
        return self.to(torch.float16)

    def float(self) -> "AdaptedWeight":
        return self.to(torch.float32)

    def contiguous(self) -> "AdaptedWeight":
        return self._all(lambda tensor: tensor.contiguous())

    def to_local(self) -> "AdaptedWeight":
        """Itself: what stands here is this rank's part of a distributed weight already."""
        return self

    # ---- what may be asked of it, which is the base's --------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def is_cuda(self) -> bool:
        return self.base.is_cuda

    def size(self, dim: int | None = None) -> Any:
        return self.base.size(dim)

    def dim(self) -> int:
        return self.base.dim()

    def numel(self) -> int:
        return self.base.numel()

    def stride(self, dim: int | None = None) -> Any:
        return self.base.stride(dim)

    def is_contiguous(self) -> bool:
        return self.base.is_contiguous()

    def data_ptr(self) -> int:
        return self.base.data_ptr()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python looks for and may do without
            raise AttributeError(name)
        self._refuse(name)

    def __matmul__(self, other: Any) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]  # through __torch_function__

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(other, self)  # type: ignore[arg-type]  # through __torch_function__


def _grouped_elsewhere(func: Any, input: Tensor, weight: AdaptedWeight, offs: Tensor) -> Tensor:
    def product(x: Tensor, factor: Tensor) -> Tensor:
        result: Tensor = func(x, factor, offs)
        return result

    return weight._plus(product(input, weight.base), input, weight.left, weight.right, product)
