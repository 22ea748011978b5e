"""Leave the sum of a branch's output and a residual stream to the norm that reads it.

A region that takes the sum, written for the norm and for the next residual sum::

    u = stream + (h B^T s + mm(z, W));   r = norm(u)        u is rounded, and then read by the norm

A region that ends before it, where a large product adds to what the region writes::

    y = tile(h, B, s);   y += z W;   r, u = norm(stream + y)        the norm computes from the sum before it is rounded

Errors of a Llama-3-8B block against float64, without gradients, on an H100 (M 8192, R 16): 5.68e-3 with the first,
5.20e-3 with the second, 5.05e-3 of plain torch.compile; it took 0.99 of the time. The norm reads the stream's size in
either case.

Tried, and not worth a kind of program of its own: the sum, the branch's product, the norm and h of what reads it in one
kernel, which walks along its rows twice. On an H200 (M 8192, N 4096, R 16, h of 32 columns; the best of some sixty
tiles) that takes 103 us, where a copy of what it reads and writes takes 66: the second walk reads as much from the
second-level cache, and so do the factors, for each 16 rows. The three kernels in its place take 113, in a block of
12,700 and at its lower clock rate, so that it would save less than 10. A norm's backward with the product that it reads
(32 columns) takes 99, the two in its place 103 and 124 in a block. The kernels that were timed are not kept.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from lora_fx.passes._torch import inductor_config
from lora_fx.passes.graph import (
    MM,
    is_call,
    is_pointwise,
    is_sum,
    peel_views,
    readers,
    same_count,
    shape,
    stays_in_kernel,
    val,
)
from lora_fx.passes.kernels import operators
from lora_fx.passes.tile_nodes import bias_of, can_compute, is_part_of_stacked, is_reduction, makes


def is_left_to_readers(total: Node, columns: int) -> bool:
    """Whether ``total`` is a sum of a branch and a base that a product of siblings makes, which Inductor computes.

    Where kernels of its own compute on and no region could, as a rotary embedding of q: they read both terms and do not
    round their sum, as with plain LoRA. A base by itself adds to the branch, which rounds once (`Writer.accumulated`).
    """
    if not is_sum(total) or not any(is_part_of_stacked(peel_views(a)) for a in total.args[:2]):
        return False
    return stays_in_kernel(total) and not any(can_compute(reader, columns) for reader in readers(total))


def is_left_to_norm(total: Node, value: Node) -> bool:
    """Whether ``total`` is a sum of a stream and the branch's output ``value`` that Inductor computes in a norm.

    Not where no large product can be added to ``value``: then the sum costs its region nothing.
    """
    if not (is_sum(total) and _can_accumulate(value)):
        return False
    other = next((peel_views(a) for a in total.args[:2] if peel_views(a) is not value), None)
    return other is not None and _stays(other) and _is_normed(total)


def _stays(stream: Node) -> bool:
    """Whether no large product that ``stream`` is the sum of could add itself in the place of the branch's."""
    products = _products(stream)
    return products is None or (not all(map(makes, products)) and not _can_accumulate(stream))


def _can_accumulate(value: Node) -> bool:
    """Whether a large product may add to the rest of what ``value`` is the sum of, which nobody else reads."""
    large = [product for product in _products(value) or () if not makes(product)]
    return bool(large) and all(
        len(list(readers(n))) == 1
        and val(n).dtype == val(value).dtype
        and same_count(n, value)
        and not inductor_config()._micro_pipeline_tp
        for n in large
    )


def _products(value: Node) -> list[Node] | None:
    """The products that ``value`` is the sum of; None if it is the sum of anything else."""
    found, pending = [], [value]
    while pending:
        node: Any = peel_views(pending.pop())
        if is_call(node, operators.accumulate):
            pending.append(node.args[0])
        elif is_call(node, MM, operators.scaled_mm) or bias_of(node) is not None:
            found.append(node)
        elif is_sum(node):
            pending += node.args[:2]
        else:
            return None
    return found


def _is_normed(value: Node) -> bool:
    """Whether pointwise operations lead from ``value`` to a sum over the elements of its rows."""
    pending, seen = [value], {value}
    while pending:
        for reader in readers(pending.pop()):
            if is_reduction(reader) and _reduces_rows(reader):
                return True
            if reader not in seen and is_pointwise(reader):
                seen.add(reader)
                pending.append(reader)
    return False


def _reduces_rows(node: Node) -> bool:
    source, dims = (*node.args, ())[:2]
    last = len(shape(source)) - 1  # type: ignore[arg-type]  # its schema
    return isinstance(dims, (list, tuple)) and [int(dim) % (last + 1) for dim in dims] == [last]
