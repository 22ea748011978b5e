"""A branch's product in the base's, where the rows of the weight have room for those of B.

    y = [x, h] [weight, s B]^T        [M, K + R] x [K + R, N]

The sum is made where cuBLAS makes sums anyway, and rounded once. ``lora_fx.compile`` lays weights so on a GPU
(:mod:`lora_fx.beside`); B is a parameter, which stays where it is and is copied into the room on every use.
Microseconds right after a large product on an H200 (M 8192, bfloat16; torch 2.11), of y and dX, without and with room::

    N x K           R     y               dX              to copy B    h B^T by itself    and y adding itself to that
    14336 x 4096    64    1419.5  1441.3  1393.0  1392.3  7.7          79.4               1507.1
    14336 x 4096    128   1419.5  1458.1  1393.0  1394.0  10.4         101.7              1529.4
    8192 x 3072     64    641.2   653.9   607.5   596.8   7.3          48.7               695.0

Tried, and not kept, as it gains nothing at 14336 x 4096: ``dy [weight, s B]``, whose result is dX and g side by side.
Microseconds of both dX of gate and up, both g, and the sum with ``g A`` (three runs of a quarter of a second of a
program that is not kept)::

    14336 x 4096    128   3055 to 3257 apart    2983 to 3070 side by side
    14336 x 4096    64    3019 to 3055          3028 to 3034
    8192 x 3072     64    1363 to 1373          1320 to 1325, where ``g A`` is one more matrix that a reader of dX adds
"""

from __future__ import annotations

import functools
import logging
import math
import weakref

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lora_fx.passes._torch import at_address

log = logging.getLogger("lora_fx.passes")

LEFT, RIGHT = "left", "right"
"""On which side of a weight the room is: two that read one x can have their h on either side of it."""

MIN_RANK = 65
"""Of lower ranks the kernels that read y make the sums by the way, and what is computed of the results as well (by
``block.py`` with 64 in the place of this, on two cards: ``--case r64`` 1.077 of the frozen block's time as before and
1.052 for 1.053, ``--case llama3.2-3b-r64`` 1.088 for 1.086; a fifth more activations)."""

MIN_ROWS = 4096
"""Of fewer rows y is too small for copies of B and x to be worth it."""

# By the address of a weight: who it is, the room's side and columns. An address is somebody else's when it has died.
_rooms: dict[int, tuple[weakref.ref[Tensor], str, int]] = {}


def is_wide(weight: Tensor, rank: int) -> bool:
    """Whether the rows of a weight [N, K] should have room: y is larger than x, and so large that sums of it cost.

    Not in float16, of which small numbers lose digits when they are scaled down.
    """
    n, k = weight.shape
    return rank >= MIN_RANK and n > k and weight.dtype == torch.bfloat16


def is_exact(scale: float) -> bool:
    """Whether ``s B`` is exact: for powers of two.

    Others would round once more than plain torch.compile: beside a branch of 1.7 times its size, y errs 1.2 times as
    much. (One that is put into ``lora_scale`` by hand later is not looked at, and is rounded to bfloat16 itself.)
    """
    return math.frexp(abs(scale))[0] == 0.5


def note_room(weight: Tensor, side: str, columns: int) -> None:
    """Note that there is room for so many columns on this side of each row of ``weight``, which nobody else has."""
    for address in [address for address, (who, *_) in _rooms.items() if who() is None]:
        del _rooms[address]
    _rooms[weight.data_ptr()] = (weakref.ref(weight), side, columns)


def take_room(weight: Tensor | None) -> tuple[str, int]:
    """Forget the room of ``weight``, if it has any; gives side and columns. Who exchanges tensors wants no references
    to them, and may note the room again."""
    found = _find(weight) if weight is not None and _has_address(weight) else ("", 0)
    if weight is not None and found[0]:
        del _rooms[weight.data_ptr()]
    return found


def room_of(weight: Tensor | None) -> str:
    """The side on which the rows of ``weight`` have room, or nothing: whatever a module holds as its weight."""
    return _find(weight)[0] if weight is not None and _has_address(weight) else ""


def _has_address(tensor: Tensor) -> bool:
    """Whether a tensor is one part of memory: initialised, dense, with values, and of no subclass."""
    if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return False
    return type(tensor.detach()) is Tensor


def _find(weight: Tensor) -> tuple[str, int]:
    who, side, columns = _rooms.get(weight.data_ptr(), (lambda: None, "", 0))
    owner = who()
    if owner is None or owner.data_ptr() != weight.data_ptr() or owner.device != weight.device:
        return "", 0
    if weight.shape != owner.shape or weight.stride() != (weight.shape[1] + columns, 1) or weight.dtype != owner.dtype:
        return "", 0
    return side, columns


def wide_mm(xh: Tensor, weight: Tensor, b: Tensor, scale: Tensor | None, side: str) -> Tensor:
    """``x weight^T + scale * h b^T``: xh [M, K + R] is [h, x] or [x, h], by the side; weight [N, K], b [N, R].

    Where the weight has no such room, as after a move, it is two products and a sum, and the log says so. Not for
    calls on several streams at once with different ``b`` or ``scale``: they would write the same room.
    """
    (n, k), rank = weight.shape, b.shape[1]
    if _find(weight) == (side, rank):
        start = weight.data_ptr() - (rank * weight.itemsize if side == LEFT else 0)
        both = at_address(start, (n, k + rank), weight.dtype, weight.device)
        room = both[:, :rank] if side == LEFT else both[:, k:]
        if scale is None:
            room.copy_(b)
        else:
            torch.mul(b, scale, out=room)
        return torch.mm(xh, both.t())
    _say_once()
    h, x = (xh[:, :rank], xh[:, rank:]) if side == LEFT else (xh[:, k:], xh[:, :k])
    update = torch.mm(h, b.t())
    return torch.mm(x, weight.t()) + (update if scale is None else update * scale)


def wide_mm_fake(xh: Tensor, weight: Tensor, b: Tensor, scale: Tensor | None, side: str) -> Tensor:
    """The result without values."""
    torch._check(xh.dim() == weight.dim() == b.dim() == 2, lambda: f"{xh.shape}, {weight.shape} and {b.shape}")
    torch._check(xh.shape[1] == weight.shape[1] + b.shape[1], lambda: f"{xh.shape}, {weight.shape} and {b.shape}")
    torch._check(weight.shape[0] == b.shape[0], lambda: f"{weight.shape} and {b.shape}")
    torch._check(side in (LEFT, RIGHT), lambda: side)
    return xh.new_empty(xh.shape[0], weight.shape[0])


@functools.cache
def _say_once() -> None:
    log.warning(
        "weights were replaced after lora_fx.compile had given their rows room for lora_b: there the branch is added "
        "in a kernel of its own, which is slower. Shard, move and load models before lora_fx.compile."
    )
