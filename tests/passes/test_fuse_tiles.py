"""Graphs after their regions have been cut out: what became of them, that they compute the same, and what is left alone.

The passes decide as on a GPU (`tests/passes/on_gpu.py`); programs run as ATen. M = 160 tokens.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.passes import on_gpu
from tests.passes.harness import Captured, Case, adapt, compare
from tests.passes.modules import QKV, Block, Mlp
from tests.passes.on_gpu import capture, programs, text

bf16 = torch.bfloat16
K, N = 136, 264
SHAPE = (2, 80, K)


def x(dtype: torch.dtype = bf16, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def linear(bias: bool = False, dtype: torch.dtype = bf16, **config: Any) -> nn.Module:
    return adapt(nn.Linear(K, N, bias=bias, dtype=dtype), **config)


def mlp(dtype: torch.dtype = bf16, **config: Any) -> nn.Module:
    return adapt(Mlp(K, N).to(dtype), **config)


class NormedQKV(nn.Module):
    """q, k and v of a normalised residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.qkv = QKV(K, K)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(self.norm(x))


def normed(dtype: torch.dtype = bf16, **config: Any) -> nn.Module:
    return adapt(NormedQKV().to(dtype).requires_grad_(False), **config)


def both(captured: Captured) -> tuple[str, str]:
    return text(captured.forward[0].graph), text(captured.backward[0].graph)


# ---- golden graphs ---------------------------------------------------------------------------------------------------


def test_one_linear() -> None:
    forward, backward = both(capture(linear(), x()))
    assert_expected_inline(
        forward,
        """\
%0 = input bf16[264, 136]
%1 = input bf16[2, 80, 136]
%2 = input f32[]
%3 = input f32[]
%4 = input bf16[4, 136]
%5 = input bf16[264, 4]
%6 = permute(%0, [1, 0]) bf16[136, 264]
%7 = view(%1, [160, 136]) bf16[160, 136]
%8 = mm(%7, %6) bf16[160, 264]
%9 = mul(%2, %3) f32[]
%10 = lora_fx.tile_outputs(#0, %1, 160) (f32[1, 160, 4])
%11 = getitem(%10, 0) f32[1, 160, 4]
%12 = auto_functionalized(lora_fx.tile_, outputs=[%11], program=#0, inputs=[%1, %4]) (None, (f32[1, 160, 4]))
%13 = getitem(%12, 1) (f32[1, 160, 4])
%14 = getitem(%13, 0) f32[1, 160, 4]
%15 = sum(%14, [0]) f32[160, 4]
%16 = convert_element_type(%15, bf16) bf16[160, 4]
%17 = auto_functionalized(lora_fx.tile_, outputs=[%8], program=#1, inputs=[%16, %5, %9, %8]) (None, (bf16[160, 264]))
%18 = getitem(%17, 1) (bf16[160, 264])
%19 = getitem(%18, 0) bf16[160, 264]
%20 = view(%19, [2, 80, 264]) bf16[2, 80, 264]
return %20, %0, %4, %5, %7, %9, %16
#0: bfloat16, 136 columns; in0 full, in1 factor 4 RN
    0: load in0
    1: down %0 in1
#1: bfloat16, 264 columns; in0 thin 4, in1 factor 4 NR, in2 number, in3 full
    0: product in0 in1 in2
    1: load in3
    2: op add %1 %0
    3: store %2 bfloat16""",
    )
    assert_expected_inline(
        backward,
        """\
%0 = input bf16[264, 136]
%1 = input bf16[4, 136]
%2 = input bf16[264, 4]
%3 = input bf16[160, 136]
%4 = input f32[]
%5 = input bf16[160, 4]
| %6 = tangent bf16[2, 80, 264]
| %7 = lora_fx.tile_outputs(#0, %6, 160) (f32[1, 160, 4], f32[1, 264, 4])
| %8 = getitem(%7, 0) f32[1, 160, 4]
| %9 = getitem(%7, 1) f32[1, 264, 4]
| %10 = auto_functionalized(lora_fx.tile_, outputs=[%8, %9], program=#0, inputs=[%6, %2, %5]) (None, (f32[1, 160, 4], f32[1, 264, 4]))
| %11 = getitem(%10, 1) (f32[1, 160, 4], f32[1, 264, 4])
| %12 = getitem(%11, 0) f32[1, 160, 4]
| %13 = sum(%12, [0]) f32[160, 4]
| %14 = mul(%13, %4) f32[160, 4]
| %15 = convert_element_type(%14, bf16) bf16[160, 4]
| %16 = getitem(%11, 1) f32[1, 264, 4]
| %17 = sum(%16, [0]) f32[264, 4]
| %18 = mul(%17, %4) f32[264, 4]
| %19 = convert_element_type(%18, bf16) bf16[264, 4]
| %20 = lora_fx.tile_outputs(#1, %3, 160) (f32[1, 4, 136])
| %21 = getitem(%20, 0) f32[1, 4, 136]
| %22 = auto_functionalized(lora_fx.tile_, outputs=[%21], program=#1, inputs=[%3, %15]) (None, (f32[1, 4, 136]))
| %23 = getitem(%22, 1) (f32[1, 4, 136])
| %24 = getitem(%23, 0) f32[1, 4, 136]
| %25 = sum(%24, [0]) f32[4, 136]
| %26 = convert_element_type(%25, bf16) bf16[4, 136]
| %27 = view(%6, [160, 264]) bf16[160, 264]
%28 = permute(%0, [1, 0]) bf16[136, 264]
| %29 = permute(%28, [1, 0]) bf16[264, 136]
| %30 = mm(%27, %29) bf16[160, 136]
| %31 = auto_functionalized(lora_fx.tile_, outputs=[%30], program=#2, inputs=[%15, %1, %30]) (None, (bf16[160, 136]))
| %32 = getitem(%31, 1) (bf16[160, 136])
| %33 = getitem(%32, 0) bf16[160, 136]
| %34 = view(%33, [2, 80, 136]) bf16[2, 80, 136]
return None, %34, None, None, %26, %19
#0: bfloat16, 264 columns; in0 full, in1 factor 4 NR, in2 thin 4
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 136 columns; in0 full, in1 thin 4
    0: load in0
    1: across %0 in1 RN
#2: bfloat16, 136 columns; in0 thin 4, in1 factor 4 RN, in2 full
    0: product in0 in1
    1: load in2
    2: op add %1 %0
    3: store %2 bfloat16""",
    )


def test_swiglu() -> None:
    forward, backward = both(capture(mlp(), x()))
    assert_expected_inline(
        forward,
        """\
%0 = input bf16[264, 136]
%1 = input bf16[2, 80, 136]
%2 = input f32[]
%3 = input f32[]
%4 = input bf16[4, 136]
%5 = input bf16[264, 4]
%6 = input bf16[264, 136]
%7 = input f32[]
%8 = input f32[]
%9 = input bf16[4, 136]
%10 = input bf16[264, 4]
%11 = input bf16[136, 264]
%12 = input f32[]
%13 = input f32[]
%14 = input bf16[4, 264]
%15 = input bf16[136, 4]
%16 = permute(%0, [1, 0]) bf16[136, 264]
%17 = view(%1, [160, 136]) bf16[160, 136]
%18 = mm(%17, %16) bf16[160, 264]
%19 = _foreach_mul([%2, %7, %12], [%3, %8, %13]) (f32[], f32[], f32[])
%20 = getitem(%19, 0) f32[]
%21 = getitem(%19, 1) f32[]
%22 = getitem(%19, 2) f32[]
%23 = cat([%4, %9], 0) bf16[8, 136]
%24 = lora_fx.tile_outputs(#0, %1, 160) (f32[1, 160, 8])
%25 = getitem(%24, 0) f32[1, 160, 8]
%26 = auto_functionalized(lora_fx.tile_, outputs=[%25], program=#0, inputs=[%1, %23]) (None, (f32[1, 160, 8]))
%27 = getitem(%26, 1) (f32[1, 160, 8])
%28 = getitem(%27, 0) f32[1, 160, 8]
%29 = sum(%28, [0]) f32[160, 8]
%30 = convert_element_type(%29, bf16) bf16[160, 8]
%31 = slice(%30, 1, 0, 4) bf16[160, 4]
%32 = permute(%6, [1, 0]) bf16[136, 264]
%33 = mm(%17, %32) bf16[160, 264]
%34 = slice(%30, 1, 4, 8) bf16[160, 4]
%35 = permute(%11, [1, 0]) bf16[264, 136]
%36 = lora_fx.tile_outputs(#1, %31, 160) (bf16[160, 264], f32[1, 160, 4])
%37 = getitem(%36, 0) bf16[160, 264]
%38 = getitem(%36, 1) f32[1, 160, 4]
%39 = auto_functionalized(lora_fx.tile_, outputs=[%37, %38], program=#1, inputs=[%31, %5, %20, %18, %34, %10, %21, %33, %14]) (None, (bf16[160, 264], f32[1, 160, 4]))
%40 = getitem(%39, 1) (bf16[160, 264], f32[1, 160, 4])
%41 = getitem(%40, 0) bf16[160, 264]
%42 = reshape(%41, [2, 80, 264]) bf16[2, 80, 264]
%43 = view(%42, [160, 264]) bf16[160, 264]
%44 = mm(%43, %35) bf16[160, 136]
%45 = getitem(%40, 1) f32[1, 160, 4]
%46 = sum(%45, [0]) f32[160, 4]
%47 = convert_element_type(%46, bf16) bf16[160, 4]
%48 = auto_functionalized(lora_fx.tile_, outputs=[%44], program=#2, inputs=[%47, %15, %22, %44]) (None, (bf16[160, 136]))
%49 = getitem(%48, 1) (bf16[160, 136])
%50 = getitem(%49, 0) bf16[160, 136]
%51 = view(%50, [2, 80, 136]) bf16[2, 80, 136]
return %51, %0, %4, %5, %6, %9, %10, %11, %14, %15, %17, %18, %20, %31, %33, %21, %34, %22, %47
#0: bfloat16, 136 columns; in0 full, in1 factor 8 RN
    0: load in0
    1: down %0 in1
#1: bfloat16, 264 columns; in0 thin 4, in1 factor 4 NR, in2 number, in3 full, in4 thin 4, in5 factor 4 NR, in6 number, in7 full, in8 factor 4 RN
    0: product in0 in1 in2
    1: load in3
    2: op add %1 %0
    3: op neg %2
    4: op exp %3
    5: op add %4 1.0
    6: op sigmoid %2
    7: op mul %2 %6
    8: product in4 in5 in6
    9: load in7
    10: op add %9 %8
    11: op mul %7 %10
    12: store %11 bfloat16
    13: down %11 in8
#2: bfloat16, 136 columns; in0 thin 4, in1 factor 4 NR, in2 number, in3 full
    0: product in0 in1 in2
    1: load in3
    2: op add %1 %0
    3: store %2 bfloat16""",
    )
    assert_expected_inline(
        backward,
        """\
%0 = input bf16[264, 136]
%1 = input bf16[4, 136]
%2 = input bf16[264, 4]
%3 = input bf16[264, 136]
%4 = input bf16[4, 136]
%5 = input bf16[264, 4]
%6 = input bf16[136, 264]
%7 = input bf16[4, 264]
%8 = input bf16[136, 4]
%9 = input bf16[160, 136]
%10 = input bf16[160, 264]
%11 = input f32[]
%12 = input bf16[160, 4]
%13 = input bf16[160, 264]
%14 = input f32[]
%15 = input bf16[160, 4]
%16 = input f32[]
%17 = input bf16[160, 4]
| %18 = tangent bf16[2, 80, 136]
| %19 = lora_fx.tile_outputs(#0, %18, 160) (f32[1, 160, 4], f32[1, 136, 4])
| %20 = getitem(%19, 0) f32[1, 160, 4]
| %21 = getitem(%19, 1) f32[1, 136, 4]
| %22 = auto_functionalized(lora_fx.tile_, outputs=[%20, %21], program=#0, inputs=[%18, %8, %17]) (None, (f32[1, 160, 4], f32[1, 136, 4]))
| %23 = getitem(%22, 1) (f32[1, 160, 4], f32[1, 136, 4])
| %24 = getitem(%23, 0) f32[1, 160, 4]
| %25 = sum(%24, [0]) f32[160, 4]
| %26 = mul(%25, %16) f32[160, 4]
| %27 = convert_element_type(%26, bf16) bf16[160, 4]
| %28 = getitem(%23, 1) f32[1, 136, 4]
| %29 = sum(%28, [0]) f32[136, 4]
| %30 = mul(%29, %16) f32[136, 4]
| %31 = convert_element_type(%30, bf16) bf16[136, 4]
| %32 = view(%18, [160, 136]) bf16[160, 136]
%33 = permute(%6, [1, 0]) bf16[264, 136]
| %34 = permute(%33, [1, 0]) bf16[136, 264]
| %35 = mm(%32, %34) bf16[160, 264]
%36 = permute(%3, [1, 0]) bf16[136, 264]
| %37 = permute(%36, [1, 0]) bf16[264, 136]
| %38 = lora_fx.tile_outputs(#1, %12, 160) (f32[1, 4, 264], bf16[160, 264], bf16[160, 264])
| %39 = getitem(%38, 0) f32[1, 4, 264]
| %40 = getitem(%38, 2) bf16[160, 264]
| %41 = auto_functionalized(lora_fx.tile_, outputs=[%39, %35, %40], program=#1, inputs=[%12, %2, %11, %10, %15, %5, %14, %13, %27, %7, %35]) (None, (f32[1, 4, 264], bf16[160, 264], bf16[160, 264]))
| %42 = getitem(%41, 1) (f32[1, 4, 264], bf16[160, 264], bf16[160, 264])
| %43 = getitem(%42, 0) f32[1, 4, 264]
| %44 = sum(%43, [0]) f32[4, 264]
| %45 = convert_element_type(%44, bf16) bf16[4, 264]
| %46 = getitem(%42, 1) bf16[160, 264]
| %47 = reshape(%46, [2, 80, 264]) bf16[2, 80, 264]
| %48 = lora_fx.tile_outputs(#2, %46, 160) (f32[1, 160, 4], f32[1, 264, 4])
| %49 = getitem(%48, 0) f32[1, 160, 4]
| %50 = getitem(%48, 1) f32[1, 264, 4]
| %51 = auto_functionalized(lora_fx.tile_, outputs=[%49, %50], program=#2, inputs=[%46, %5, %15]) (None, (f32[1, 160, 4], f32[1, 264, 4]))
| %52 = getitem(%51, 1) (f32[1, 160, 4], f32[1, 264, 4])
| %53 = getitem(%52, 0) f32[1, 160, 4]
| %54 = sum(%53, [0]) f32[160, 4]
| %55 = mul(%54, %14) f32[160, 4]
| %56 = convert_element_type(%55, bf16) bf16[160, 4]
| %57 = getitem(%52, 1) f32[1, 264, 4]
| %58 = sum(%57, [0]) f32[264, 4]
| %59 = mul(%58, %14) f32[264, 4]
| %60 = convert_element_type(%59, bf16) bf16[264, 4]
| %61 = view(%47, [160, 264]) bf16[160, 264]
| %62 = mm(%61, %37) bf16[160, 136]
| %63 = getitem(%42, 2) bf16[160, 264]
| %64 = reshape(%63, [2, 80, 264]) bf16[2, 80, 264]
| %65 = lora_fx.tile_outputs(#2, %63, 160) (f32[1, 160, 4], f32[1, 264, 4])
| %66 = getitem(%65, 0) f32[1, 160, 4]
| %67 = getitem(%65, 1) f32[1, 264, 4]
| %68 = auto_functionalized(lora_fx.tile_, outputs=[%66, %67], program=#2, inputs=[%63, %2, %12]) (None, (f32[1, 160, 4], f32[1, 264, 4]))
| %69 = getitem(%68, 1) (f32[1, 160, 4], f32[1, 264, 4])
| %70 = getitem(%69, 0) f32[1, 160, 4]
| %71 = sum(%70, [0]) f32[160, 4]
| %72 = mul(%71, %11) f32[160, 4]
| %73 = convert_element_type(%72, bf16) bf16[160, 4]
| %74 = getitem(%69, 1) f32[1, 264, 4]
| %75 = sum(%74, [0]) f32[264, 4]
| %76 = mul(%75, %11) f32[264, 4]
| %77 = convert_element_type(%76, bf16) bf16[264, 4]
| %78 = cat([%73, %56], 1) bf16[160, 8]
| %79 = lora_fx.tile_outputs(#3, %9, 160) (f32[1, 8, 136])
| %80 = getitem(%79, 0) f32[1, 8, 136]
| %81 = auto_functionalized(lora_fx.tile_, outputs=[%80], program=#3, inputs=[%9, %78]) (None, (f32[1, 8, 136]))
| %82 = getitem(%81, 1) (f32[1, 8, 136])
| %83 = getitem(%82, 0) f32[1, 8, 136]
| %84 = sum(%83, [0]) f32[8, 136]
| %85 = convert_element_type(%84, bf16) bf16[8, 136]
| %86 = slice(%85, 0, 4, 8) bf16[4, 136]
| %87 = slice(%85, 0, 0, 4) bf16[4, 136]
%88 = cat([%1, %4], 0) bf16[8, 136]
| %89 = view(%64, [160, 264]) bf16[160, 264]
%90 = permute(%0, [1, 0]) bf16[136, 264]
| %91 = permute(%90, [1, 0]) bf16[264, 136]
| %92 = mm(%89, %91) bf16[160, 136]
| %93 = auto_functionalized(lora_fx.tile_, outputs=[%62], program=#4, inputs=[%78, %88, %62, %92]) (None, (bf16[160, 136]))
| %94 = getitem(%93, 1) (bf16[160, 136])
| %95 = getitem(%94, 0) bf16[160, 136]
| %96 = reshape(%95, [2, 80, 136]) bf16[2, 80, 136]
return None, %96, None, None, %87, %77, None, None, None, %86, %60, None, None, None, %45, %31
#0: bfloat16, 136 columns; in0 full, in1 factor 4 NR, in2 thin 4
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 264 columns; in0 thin 4, in1 factor 4 NR, in2 number, in3 full, in4 thin 4, in5 factor 4 NR, in6 number, in7 full, in8 thin 4, in9 factor 4 RN, in10 full
    0: product in0 in1 in2
    1: load in3
    2: op add %1 %0
    3: op neg %2
    4: op exp %3
    5: op add %4 1.0
    6: op sigmoid %2
    7: op mul %2 %6
    8: product in4 in5 in6
    9: load in7
    10: op add %9 %8
    11: op mul %7 %10
    12: across %11 in8 RN
    13: product in8 in9
    14: load in10
    15: op add %13 %14
    16: op mul %15 %7
    17: store %16 bfloat16
    18: op mul %15 %10
    19: op mul %18 %6
    20: op sub 1.0 %6
    21: op mul %2 %20
    22: op add %21 1.0
    23: op mul %19 %22
    24: store %23 bfloat16
#2: bfloat16, 264 columns; in0 full, in1 factor 4 NR, in2 thin 4
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#3: bfloat16, 136 columns; in0 full, in1 thin 8
    0: load in0
    1: across %0 in1 RN
#4: bfloat16, 136 columns; in0 thin 8, in1 factor 8 RN, in2 full, in3 full
    0: product in0 in1
    1: load in2
    2: op add %1 %0
    3: load in3
    4: op add %2 %3
    5: store %4 bfloat16""",
    )


def test_qkv_of_a_norm() -> None:
    forward, backward = both(capture(normed(), x()))
    assert_expected_inline(
        forward,
        """\
%0 = input bf16[136]
%1 = input bf16[2, 80, 136]
%2 = input bf16[136, 136]
%3 = input f32[]
%4 = input f32[]
%5 = input bf16[4, 136]
%6 = input bf16[136, 4]
%7 = input bf16[136, 136]
%8 = input f32[]
%9 = input f32[]
%10 = input bf16[4, 136]
%11 = input bf16[136, 4]
%12 = input bf16[136, 136]
%13 = input f32[]
%14 = input f32[]
%15 = input bf16[4, 136]
%16 = input bf16[136, 4]
%17 = convert_element_type(%1, f32) f32[2, 80, 136]
%18 = pow(%17, 2) f32[2, 80, 136]
%19 = mean(%18, [2], True) f32[2, 80, 1]
%20 = add(%19, 1.1920928955078125e-07) f32[2, 80, 1]
%21 = rsqrt(%20) f32[2, 80, 1]
%22 = mul(%17, %21) f32[2, 80, 136]
%23 = mul(%22, %0) f32[2, 80, 136]
%24 = convert_element_type(%23, bf16) bf16[2, 80, 136]
%25 = permute(%2, [1, 0]) bf16[136, 136]
%26 = view(%24, [160, 136]) bf16[160, 136]
%27 = mm(%26, %25) bf16[160, 136]
%28 = _foreach_mul([%3, %8, %13], [%4, %9, %14]) (f32[], f32[], f32[])
%29 = getitem(%28, 0) f32[]
%30 = getitem(%28, 1) f32[]
%31 = getitem(%28, 2) f32[]
%32 = cat([%5, %10, %15], 0) bf16[12, 136]
%33 = lora_fx.tile_outputs(#0, %24, 160) (f32[1, 160, 12])
%34 = getitem(%33, 0) f32[1, 160, 12]
%35 = auto_functionalized(lora_fx.tile_, outputs=[%34], program=#0, inputs=[%24, %32]) (None, (f32[1, 160, 12]))
%36 = getitem(%35, 1) (f32[1, 160, 12])
%37 = getitem(%36, 0) f32[1, 160, 12]
%38 = sum(%37, [0]) f32[160, 12]
%39 = convert_element_type(%38, bf16) bf16[160, 12]
%40 = slice(%39, 1, 0, 4) bf16[160, 4]
%41 = auto_functionalized(lora_fx.tile_, outputs=[%27], program=#1, inputs=[%40, %6, %29, %27]) (None, (bf16[160, 136]))
%42 = getitem(%41, 1) (bf16[160, 136])
%43 = getitem(%42, 0) bf16[160, 136]
%44 = view(%43, [2, 80, 136]) bf16[2, 80, 136]
%45 = permute(%7, [1, 0]) bf16[136, 136]
%46 = mm(%26, %45) bf16[160, 136]
%47 = slice(%39, 1, 4, 8) bf16[160, 4]
%48 = auto_functionalized(lora_fx.tile_, outputs=[%46], program=#1, inputs=[%47, %11, %30, %46]) (None, (bf16[160, 136]))
%49 = getitem(%48, 1) (bf16[160, 136])
%50 = getitem(%49, 0) bf16[160, 136]
%51 = view(%50, [2, 80, 136]) bf16[2, 80, 136]
%52 = permute(%12, [1, 0]) bf16[136, 136]
%53 = mm(%26, %52) bf16[160, 136]
%54 = slice(%39, 1, 8, 12) bf16[160, 4]
%55 = auto_functionalized(lora_fx.tile_, outputs=[%53], program=#1, inputs=[%54, %16, %31, %53]) (None, (bf16[160, 136]))
%56 = getitem(%55, 1) (bf16[160, 136])
%57 = getitem(%56, 0) bf16[160, 136]
%58 = view(%57, [2, 80, 136]) bf16[2, 80, 136]
return %44, %51, %58, %0, %1, %2, %5, %6, %7, %10, %11, %12, %15, %16, %21, %29, %40, %30, %47, %31, %54
#0: bfloat16, 136 columns; in0 full, in1 factor 12 RN
    0: load in0
    1: down %0 in1
#1: bfloat16, 136 columns; in0 thin 4, in1 factor 4 NR, in2 number, in3 full
    0: product in0 in1 in2
    1: load in3
    2: op add %1 %0
    3: store %2 bfloat16""",
    )
    assert_expected_inline(
        backward,
        """\
%0 = input bf16[136]
%1 = input bf16[2, 80, 136]
%2 = input bf16[136, 136]
%3 = input bf16[4, 136]
%4 = input bf16[136, 4]
%5 = input bf16[136, 136]
%6 = input bf16[4, 136]
%7 = input bf16[136, 4]
%8 = input bf16[136, 136]
%9 = input bf16[4, 136]
%10 = input bf16[136, 4]
%11 = input f32[2, 80, 1]
%12 = input f32[]
%13 = input bf16[160, 4]
%14 = input f32[]
%15 = input bf16[160, 4]
%16 = input f32[]
%17 = input bf16[160, 4]
| %18 = tangent bf16[2, 80, 136]
| %19 = tangent bf16[2, 80, 136]
| %20 = tangent bf16[2, 80, 136]
| %21 = lora_fx.tile_outputs(#0, %20, 160) (f32[1, 160, 4], f32[1, 136, 4])
| %22 = getitem(%21, 0) f32[1, 160, 4]
| %23 = getitem(%21, 1) f32[1, 136, 4]
| %24 = auto_functionalized(lora_fx.tile_, outputs=[%22, %23], program=#0, inputs=[%20, %10, %17]) (None, (f32[1, 160, 4], f32[1, 136, 4]))
| %25 = getitem(%24, 1) (f32[1, 160, 4], f32[1, 136, 4])
| %26 = getitem(%25, 0) f32[1, 160, 4]
| %27 = sum(%26, [0]) f32[160, 4]
| %28 = mul(%27, %16) f32[160, 4]
| %29 = convert_element_type(%28, bf16) bf16[160, 4]
| %30 = getitem(%25, 1) f32[1, 136, 4]
| %31 = sum(%30, [0]) f32[136, 4]
| %32 = mul(%31, %16) f32[136, 4]
| %33 = convert_element_type(%32, bf16) bf16[136, 4]
| %34 = view(%20, [160, 136]) bf16[160, 136]
%35 = permute(%8, [1, 0]) bf16[136, 136]
| %36 = permute(%35, [1, 0]) bf16[136, 136]
| %37 = mm(%34, %36) bf16[160, 136]
| %38 = lora_fx.tile_outputs(#0, %19, 160) (f32[1, 160, 4], f32[1, 136, 4])
| %39 = getitem(%38, 0) f32[1, 160, 4]
| %40 = getitem(%38, 1) f32[1, 136, 4]
| %41 = auto_functionalized(lora_fx.tile_, outputs=[%39, %40], program=#0, inputs=[%19, %7, %15]) (None, (f32[1, 160, 4], f32[1, 136, 4]))
| %42 = getitem(%41, 1) (f32[1, 160, 4], f32[1, 136, 4])
| %43 = getitem(%42, 0) f32[1, 160, 4]
| %44 = sum(%43, [0]) f32[160, 4]
| %45 = mul(%44, %14) f32[160, 4]
| %46 = convert_element_type(%45, bf16) bf16[160, 4]
| %47 = getitem(%42, 1) f32[1, 136, 4]
| %48 = sum(%47, [0]) f32[136, 4]
| %49 = mul(%48, %14) f32[136, 4]
| %50 = convert_element_type(%49, bf16) bf16[136, 4]
| %51 = view(%19, [160, 136]) bf16[160, 136]
%52 = permute(%5, [1, 0]) bf16[136, 136]
| %53 = permute(%52, [1, 0]) bf16[136, 136]
| %54 = mm(%51, %53) bf16[160, 136]
| %55 = lora_fx.tile_outputs(#0, %18, 160) (f32[1, 160, 4], f32[1, 136, 4])
| %56 = getitem(%55, 0) f32[1, 160, 4]
| %57 = getitem(%55, 1) f32[1, 136, 4]
| %58 = auto_functionalized(lora_fx.tile_, outputs=[%56, %57], program=#0, inputs=[%18, %4, %13]) (None, (f32[1, 160, 4], f32[1, 136, 4]))
| %59 = getitem(%58, 1) (f32[1, 160, 4], f32[1, 136, 4])
| %60 = getitem(%59, 0) f32[1, 160, 4]
| %61 = sum(%60, [0]) f32[160, 4]
| %62 = mul(%61, %12) f32[160, 4]
| %63 = convert_element_type(%62, bf16) bf16[160, 4]
| %64 = getitem(%59, 1) f32[1, 136, 4]
| %65 = sum(%64, [0]) f32[136, 4]
| %66 = mul(%65, %12) f32[136, 4]
| %67 = convert_element_type(%66, bf16) bf16[136, 4]
| %68 = cat([%63, %46, %29], 1) bf16[160, 12]
%69 = convert_element_type(%1, f32) f32[2, 80, 136]
| %70 = lora_fx.tile_outputs(#1, %1, 160) (f32[1, 12, 136])
| %71 = getitem(%70, 0) f32[1, 12, 136]
| %72 = auto_functionalized(lora_fx.tile_, outputs=[%71], program=#1, inputs=[%1, %11, %0, %68]) (None, (f32[1, 12, 136]))
| %73 = getitem(%72, 1) (f32[1, 12, 136])
| %74 = getitem(%73, 0) f32[1, 12, 136]
| %75 = sum(%74, [0]) f32[12, 136]
| %76 = convert_element_type(%75, bf16) bf16[12, 136]
| %77 = slice(%76, 0, 8, 12) bf16[4, 136]
| %78 = slice(%76, 0, 4, 8) bf16[4, 136]
| %79 = slice(%76, 0, 0, 4) bf16[4, 136]
%80 = cat([%3, %6, %9], 0) bf16[12, 136]
| %81 = view(%18, [160, 136]) bf16[160, 136]
%82 = permute(%2, [1, 0]) bf16[136, 136]
| %83 = permute(%82, [1, 0]) bf16[136, 136]
| %84 = mm(%81, %83) bf16[160, 136]
| %85 = auto_functionalized(lora_fx.tile_, outputs=[%54], program=#2, inputs=[%37, %54, %68, %80, %84]) (None, (bf16[160, 136]))
| %86 = getitem(%85, 1) (bf16[160, 136])
| %87 = getitem(%86, 0) bf16[160, 136]
| %88 = reshape(%87, [2, 80, 136]) bf16[2, 80, 136]
| %89 = convert_element_type(%88, f32) f32[2, 80, 136]
| %90 = mul(%89, %0) f32[2, 80, 136]
| %91 = mul(%90, %69) f32[2, 80, 136]
| %92 = mul(%90, %11) f32[2, 80, 136]
| %93 = sum(%91, [2], True) f32[2, 80, 1]
| %94 = pow(%11, 3) f32[2, 80, 1]
| %95 = mul(%93, -0.5) f32[2, 80, 1]
| %96 = mul(%95, %94) f32[2, 80, 1]
| %97 = expand(%96, [2, 80, 136]) f32[2, 80, 136]
| %98 = div(%97, 136) f32[2, 80, 136]
| %99 = pow(%69, 1.0) f32[2, 80, 136]
| %100 = mul(%99, 2.0) f32[2, 80, 136]
| %101 = mul(%98, %100) f32[2, 80, 136]
| %102 = add(%92, %101) f32[2, 80, 136]
| %103 = convert_element_type(%102, bf16) bf16[2, 80, 136]
return None, %103, None, None, None, %79, %67, None, None, None, %78, %50, None, None, None, %77, %33
#0: bfloat16, 136 columns; in0 full, in1 factor 4 NR, in2 thin 4
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 136 columns; in0 full, in1 row, in2 column, in3 thin 12
    0: load in0
    1: load in1
    2: op mul %0 %1
    3: load in2
    4: op mul %2 %3
    5: across %4 in3 RN
#2: bfloat16, 136 columns; in0 full, in1 full, in2 thin 12, in3 factor 12 RN, in4 full
    0: load in0
    1: load in1
    2: op add %0 %1
    3: product in2 in3
    4: op add %2 %3
    5: load in4
    6: op add %4 %5
    7: store %6 bfloat16""",
    )


# ---- numerics --------------------------------------------------------------------------------------------------------


def case(name: str, build: Callable[[], nn.Module], sites: int, **more: Any) -> Case:
    return Case(name, build, sites, {}, **{"dtype": bf16, "shape": SHAPE, "seeds": 4, **more})


def checkpointed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.utils.checkpoint.checkpoint(module, t, use_reentrant=False)


class Gated(nn.Module):
    """Two linears, a gate of several pointwise operations, a mask, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(K, K, bias=True), nn.Linear(K, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return x + torch.where(a > 0, a, b) * torch.tanh(b) + F.relu(a) / (1 + b.abs())


CASES = [
    (case("linear", linear, 1), (2, 3)),
    (case("linear in float16", lambda: linear(dtype=torch.float16), 1, dtype=torch.float16), (2, 3)),
    (case("bias", lambda: linear(bias=True), 1), (2, 3)),
    (case("matrix", linear, 1, shape=(160, K)), (2, 3)),
    (case("x without a gradient", linear, 1, x_grad=False), (2, 2)),
    (case("rank 1", lambda: linear(rank=1), 1), (2, 3)),
    (case("smaller than a rank may be", lambda: adapt(nn.Linear(48, 40, dtype=bf16)), 1, shape=(160, 48)), (2, 3)),
    (case("SwiGLU", mlp, 3), (3, 6)),
    (case("gelu", lambda: adapt(Mlp(K, N, F.gelu).to(bf16)), 3), (3, 6)),
    (case("q, k, v of a norm", normed, 3), (4, 5)),
    (case("gated", lambda: adapt(Gated().to(bf16)), 2), (3, 6)),
    (case("no gradient", mlp, 3, grad=torch.no_grad), (3, 0)),
    (case("checkpointed", mlp, 3, wrap=checkpointed), (3, 10)),
    (case("any number of tokens", mlp, 3, shapes=((2, 80, K), (3, 70, K), (1, 131, K)), dynamic=True, seeds=2), (3, 6)),
    (case("autocast", lambda: mlp(torch.float32), 3, dtype=torch.float32, autocast=True), (3, 6)),
    (case("dropout", lambda: mlp(dropout=0.25), 3, random=True), (4, 5)),
]


@pytest.mark.parametrize(("case", "count"), CASES, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_as_accurate_as_plain_compile(case: Case, count: tuple[int, int]) -> None:
    result = compare(case, on_gpu.by_graphs)
    result.assert_as_accurate()
    captured = result.captured
    assert captured.reasons == [] and captured.sites == case.sites
    assert len(captured.forward) == len(result.theirs.forward), "it recompiles"
    halves = (captured.forward, captured.backward)
    found = tuple(len(programs(half[0].graph)) if half else 0 for half in halves)
    assert found == count
    assert result.ours.saved <= result.plain.saved


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        case("SwiGLU", mlp, 3, seeds=2),
        case("block", lambda: adapt(Block(K).to(bf16).requires_grad_(False)), 7, seeds=2),
        case("any number of tokens", mlp, 3, shapes=((2, 80, K), (3, 70, K)), dynamic=True, seeds=1),
    ],
    ids=str,
)
def test_among_kernels(case: Case) -> None:
    """Inductor's own code around programs; outputs may take the memory of products that die."""
    result = compare(case, on_gpu.by_kernels)
    result.assert_as_accurate()
    assert result.captured.sites == case.sites
