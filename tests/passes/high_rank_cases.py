"""Tile programs of ranks above 32, where the matrix library does a part of what programs do at lower ones."""

from tests.passes.tile_cases import branch, norm, pair, swiglu, swiglu_backward, swiglu_backward_written

HIGH_RANKS = [
    case
    for r in (48, 64)
    for case in (
        branch(r, "NR", True),
        swiglu(r, r),
        swiglu(r, r, ("store",)),
        swiglu_backward(r, ("store", "across")),
        pair(r, "NR"),
        norm(r),
    )
] + [
    case
    for r in (100, 128)
    for case in (
        branch(r, "NR", True),
        swiglu(r, r, ("store",)),
        swiglu(r, 16),
        swiglu_backward(r, ("store",)),
        swiglu_backward_written(r),
    )
]
"""What a region is at these ranks, for the tiles that are chosen for it."""
