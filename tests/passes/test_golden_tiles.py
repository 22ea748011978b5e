"""The forward and backward graphs of a linear and of SwiGLU after their regions have been cut out, as on a GPU.

One tile serves every program (`tests/passes/on_gpu.py`), so these graphs do not hang on how tiles are chosen. Below
each graph stand its programs, statement by statement. M = 160 tokens, K = 136, N = 264, R = 4.
"""

from expecttest import assert_expected_inline

from tests.passes.on_gpu import capture, halves
from tests.passes.test_fuse_tiles import linear, mlp, x


def test_one_linear() -> None:
    forward, backward = halves(capture(linear(), x()))
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
%8 = mul(%2, %3) f32[]
%9 = lora_fx.tile_outputs(#0, %1, 160) (bf16[160, 4])
%10 = getitem(%9, 0) bf16[160, 4]
%11 = tile(outputs=[%10], program=#0, inputs=[%1, %4]) (None, (bf16[160, 4]))
%12 = getitem(%11, 1) (bf16[160, 4])
%13 = getitem(%12, 0) bf16[160, 4]
%14 = lora_fx.tile_outputs(#1, %13, 160) (bf16[160, 264])
%15 = getitem(%14, 0) bf16[160, 264]
%16 = tile(outputs=[%15], program=#1, inputs=[%13, %5, %8]) (None, (bf16[160, 264]))
%17 = getitem(%16, 1) (bf16[160, 264])
%18 = getitem(%17, 0) bf16[160, 264]
%19 = auto_functionalized(lora_fx.accumulate_, base=%18, a=%7, b=%6, scale=None) (None, bf16[160, 264])
%20 = getitem(%19, 1) bf16[160, 264]
%21 = view(%20, [2, 80, 264]) bf16[2, 80, 264]
return %21, %0, %4, %5, %7, %8, %13
#0: bfloat16, 136 columns; in0 full, in1 factor 4 RN
    0: load in0
    1: down %0 in1
#1: bfloat16, 264 columns; in0 thin 4, in1 factor 4 NR, in2 number
    0: product in0 in1 in2
    1: store %0 bfloat16""",
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
| %7 = lora_fx.tile_outputs(#0, %6, 160) (f32[9, 160, 4], f32[1, 264, 4])
| %8 = getitem(%7, 0) f32[9, 160, 4]
| %9 = getitem(%7, 1) f32[1, 264, 4]
| %10 = tile(outputs=[%8, %9], program=#0, inputs=[%6, %2, %5]) (None, (f32[9, 160, 4], f32[1, 264, 4]))
| %11 = getitem(%10, 1) (f32[9, 160, 4], f32[1, 264, 4])
| %12 = getitem(%11, 0) f32[9, 160, 4]
| %13 = lora_fx.sum_parts([%12], [%4], bf16) (bf16[160, 4])
| %14 = getitem(%13, 0) bf16[160, 4]
| %15 = getitem(%11, 1) f32[1, 264, 4]
| %16 = lora_fx.tile_outputs(#1, %3, 160) (f32[1, 4, 136])
| %17 = getitem(%16, 0) f32[1, 4, 136]
| %18 = tile(outputs=[%17], program=#1, inputs=[%3, %14]) (None, (f32[1, 4, 136]))
| %19 = getitem(%18, 1) (f32[1, 4, 136])
| %20 = getitem(%19, 0) f32[1, 4, 136]
| %21 = view(%6, [160, 264]) bf16[160, 264]
%22 = permute(%0, [1, 0]) bf16[136, 264]
| %23 = permute(%22, [1, 0]) bf16[264, 136]
| %24 = lora_fx.tile_outputs(#2, %14, 160) (bf16[160, 136])
| %25 = getitem(%24, 0) bf16[160, 136]
| %26 = tile(outputs=[%25], program=#2, inputs=[%14, %1]) (None, (bf16[160, 136]))
| %27 = getitem(%26, 1) (bf16[160, 136])
| %28 = getitem(%27, 0) bf16[160, 136]
| %29 = auto_functionalized(lora_fx.accumulate_, base=%28, a=%21, b=%23, scale=None) (None, bf16[160, 136])
| %30 = getitem(%29, 1) bf16[160, 136]
| %31 = view(%30, [2, 80, 136]) bf16[2, 80, 136]
| %32 = lora_fx.sum_parts([%15, %20], [%4, None], bf16) (bf16[264, 4], bf16[4, 136])
| %33 = getitem(%32, 0) bf16[264, 4]
| %34 = getitem(%32, 1) bf16[4, 136]
return None, %31, None, None, %34, %33
#0: bfloat16, 264 columns; in0 full, in1 factor 4 NR, in2 thin 4
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 136 columns; in0 full, in1 thin 4
    0: load in0
    1: across %0 in1 RN
#2: bfloat16, 136 columns; in0 thin 4, in1 factor 4 RN
    0: product in0 in1
    1: store %0 bfloat16""",
    )


def test_swiglu() -> None:
    forward, backward = halves(capture(mlp(), x()))
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
%24 = lora_fx.tile_outputs(#0, %1, 160) (bf16[160, 8])
%25 = getitem(%24, 0) bf16[160, 8]
%26 = tile(outputs=[%25], program=#0, inputs=[%1, %23]) (None, (bf16[160, 8]))
%27 = getitem(%26, 1) (bf16[160, 8])
%28 = getitem(%27, 0) bf16[160, 8]
%29 = slice(%28, 1, 0, 4) bf16[160, 4]
%30 = permute(%6, [1, 0]) bf16[136, 264]
%31 = mm(%17, %30) bf16[160, 264]
%32 = slice(%28, 1, 4, 8) bf16[160, 4]
%33 = permute(%11, [1, 0]) bf16[264, 136]
%34 = lora_fx.tile_outputs(#1, %29, 160) (bf16[160, 264], f32[9, 160, 4])
%35 = getitem(%34, 0) bf16[160, 264]
%36 = getitem(%34, 1) f32[9, 160, 4]
%37 = tile(outputs=[%35, %36], program=#1, inputs=[%29, %5, %20, %18, %32, %10, %21, %31, %14]) (None, (bf16[160,
        264], f32[9, 160, 4]))
%38 = getitem(%37, 1) (bf16[160, 264], f32[9, 160, 4])
%39 = getitem(%38, 0) bf16[160, 264]
%40 = reshape(%39, [2, 80, 264]) bf16[2, 80, 264]
%41 = view(%40, [160, 264]) bf16[160, 264]
%42 = getitem(%38, 1) f32[9, 160, 4]
%43 = lora_fx.sum_parts([%42], [None], bf16) (bf16[160, 4])
%44 = getitem(%43, 0) bf16[160, 4]
%45 = lora_fx.tile_outputs(#2, %44, 160) (bf16[160, 136])
%46 = getitem(%45, 0) bf16[160, 136]
%47 = tile(outputs=[%46], program=#2, inputs=[%44, %15, %22]) (None, (bf16[160, 136]))
%48 = getitem(%47, 1) (bf16[160, 136])
%49 = getitem(%48, 0) bf16[160, 136]
%50 = auto_functionalized(lora_fx.accumulate_, base=%49, a=%41, b=%33, scale=None) (None, bf16[160, 136])
%51 = getitem(%50, 1) bf16[160, 136]
%52 = view(%51, [2, 80, 136]) bf16[2, 80, 136]
return %52, %0, %4, %5, %6, %9, %10, %11, %14, %15, %17, %18, %20, %29, %31, %21, %32, %22, %44
#0: bfloat16, 136 columns; in0 full, in1 factor 8 RN
    0: load in0
    1: down %0 in1
#1: bfloat16, 264 columns; in0 thin 4, in1 factor 4 NR, in2 number, in3 full, in4 thin 4, in5 factor 4 NR, in6
        number, in7 full, in8 factor 4 RN
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
#2: bfloat16, 136 columns; in0 thin 4, in1 factor 4 NR, in2 number
    0: product in0 in1 in2
    1: store %0 bfloat16""",
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
| %19 = lora_fx.tile_outputs(#0, %18, 160) (f32[5, 160, 4], f32[1, 136, 4])
| %20 = getitem(%19, 0) f32[5, 160, 4]
| %21 = getitem(%19, 1) f32[1, 136, 4]
| %22 = tile(outputs=[%20, %21], program=#0, inputs=[%18, %8, %17]) (None, (f32[5, 160, 4], f32[1, 136, 4]))
| %23 = getitem(%22, 1) (f32[5, 160, 4], f32[1, 136, 4])
| %24 = getitem(%23, 0) f32[5, 160, 4]
| %25 = lora_fx.sum_parts([%24], [%16], bf16) (bf16[160, 4])
| %26 = getitem(%25, 0) bf16[160, 4]
| %27 = getitem(%23, 1) f32[1, 136, 4]
| %28 = view(%18, [160, 136]) bf16[160, 136]
%29 = permute(%6, [1, 0]) bf16[264, 136]
| %30 = permute(%29, [1, 0]) bf16[136, 264]
| %31 = mm(%28, %30) bf16[160, 264]
%32 = permute(%3, [1, 0]) bf16[136, 264]
| %33 = permute(%32, [1, 0]) bf16[264, 136]
| %34 = lora_fx.tile_outputs(#1, %12, 160) (f32[1, 4, 264], bf16[160, 264], bf16[160, 264])
| %35 = getitem(%34, 0) f32[1, 4, 264]
| %36 = getitem(%34, 2) bf16[160, 264]
| %37 = tile(outputs=[%35, %31, %36], program=#1, inputs=[%12, %2, %11, %10, %15, %5, %14, %13, %26, %7, %31])
        (None, (f32[1, 4, 264], bf16[160, 264], bf16[160, 264]))
| %38 = getitem(%37, 1) (f32[1, 4, 264], bf16[160, 264], bf16[160, 264])
| %39 = getitem(%38, 0) f32[1, 4, 264]
| %40 = getitem(%38, 1) bf16[160, 264]
| %41 = reshape(%40, [2, 80, 264]) bf16[2, 80, 264]
| %42 = lora_fx.tile_outputs(#2, %40, 160) (f32[9, 160, 4], f32[1, 264, 4])
| %43 = getitem(%42, 0) f32[9, 160, 4]
| %44 = getitem(%42, 1) f32[1, 264, 4]
| %45 = tile(outputs=[%43, %44], program=#2, inputs=[%40, %5, %15]) (None, (f32[9, 160, 4], f32[1, 264, 4]))
| %46 = getitem(%45, 1) (f32[9, 160, 4], f32[1, 264, 4])
| %47 = getitem(%46, 0) f32[9, 160, 4]
| %48 = lora_fx.sum_parts([%47], [%14], bf16) (bf16[160, 4])
| %49 = getitem(%48, 0) bf16[160, 4]
| %50 = getitem(%46, 1) f32[1, 264, 4]
| %51 = view(%41, [160, 264]) bf16[160, 264]
| %52 = getitem(%38, 2) bf16[160, 264]
| %53 = reshape(%52, [2, 80, 264]) bf16[2, 80, 264]
| %54 = lora_fx.tile_outputs(#2, %52, 160) (f32[9, 160, 4], f32[1, 264, 4])
| %55 = getitem(%54, 0) f32[9, 160, 4]
| %56 = getitem(%54, 1) f32[1, 264, 4]
| %57 = tile(outputs=[%55, %56], program=#2, inputs=[%52, %2, %12]) (None, (f32[9, 160, 4], f32[1, 264, 4]))
| %58 = getitem(%57, 1) (f32[9, 160, 4], f32[1, 264, 4])
| %59 = getitem(%58, 0) f32[9, 160, 4]
| %60 = lora_fx.sum_parts([%59], [%11], bf16) (bf16[160, 4])
| %61 = getitem(%60, 0) bf16[160, 4]
| %62 = getitem(%58, 1) f32[1, 264, 4]
| %63 = cat([%61, %49], 1) bf16[160, 8]
| %64 = lora_fx.tile_outputs(#3, %9, 160) (f32[1, 8, 136])
| %65 = getitem(%64, 0) f32[1, 8, 136]
| %66 = tile(outputs=[%65], program=#3, inputs=[%9, %63]) (None, (f32[1, 8, 136]))
| %67 = getitem(%66, 1) (f32[1, 8, 136])
| %68 = getitem(%67, 0) f32[1, 8, 136]
%69 = cat([%1, %4], 0) bf16[8, 136]
| %70 = view(%53, [160, 264]) bf16[160, 264]
%71 = permute(%0, [1, 0]) bf16[136, 264]
| %72 = permute(%71, [1, 0]) bf16[264, 136]
| %73 = mm(%70, %72) bf16[160, 136]
| %74 = lora_fx.tile_outputs(#4, %63, 160) (bf16[160, 136])
| %75 = getitem(%74, 0) bf16[160, 136]
| %76 = tile(outputs=[%75], program=#4, inputs=[%63, %69]) (None, (bf16[160, 136]))
| %77 = getitem(%76, 1) (bf16[160, 136])
| %78 = getitem(%77, 0) bf16[160, 136]
| %79 = auto_functionalized(lora_fx.accumulate_, base=%78, a=%51, b=%33, scale=None) (None, bf16[160, 136])
| %80 = getitem(%79, 1) bf16[160, 136]
| %81 = add(%80, %73) bf16[160, 136]
| %82 = reshape(%81, [2, 80, 136]) bf16[2, 80, 136]
| %83 = lora_fx.sum_parts([%27, %39, %50, %62, %68], [%16, None, %14, %11, None], bf16) (bf16[136, 4], bf16[4, 264],
        bf16[264, 4], bf16[264, 4], bf16[8, 136])
| %84 = getitem(%83, 0) bf16[136, 4]
| %85 = getitem(%83, 1) bf16[4, 264]
| %86 = getitem(%83, 2) bf16[264, 4]
| %87 = getitem(%83, 3) bf16[264, 4]
| %88 = getitem(%83, 4) bf16[8, 136]
| %89 = slice(%88, 0, 4, 8) bf16[4, 136]
| %90 = slice(%88, 0, 0, 4) bf16[4, 136]
return None, %82, None, None, %90, %87, None, None, None, %89, %86, None, None, None, %85, %84
#0: bfloat16, 136 columns; in0 full, in1 factor 4 NR, in2 thin 4
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 264 columns; in0 thin 4, in1 factor 4 NR, in2 number, in3 full, in4 thin 4, in5 factor 4 NR, in6
        number, in7 full, in8 thin 4, in9 factor 4 RN, in10 full
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
#4: bfloat16, 136 columns; in0 thin 8, in1 factor 8 RN
    0: product in0 in1
    1: store %0 bfloat16""",
    )
