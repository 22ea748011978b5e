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
| %13 = sum(%12, [0]) f32[160, 4]
| %14 = mul(%13, %4) f32[160, 4]
| %15 = convert_element_type(%14, bf16) bf16[160, 4]
| %16 = getitem(%11, 1) f32[1, 264, 4]
| %17 = sum(%16, [0]) f32[264, 4]
| %18 = mul(%17, %4) f32[264, 4]
| %19 = convert_element_type(%18, bf16) bf16[264, 4]
| %20 = lora_fx.tile_outputs(#1, %3, 160) (f32[1, 4, 136])
| %21 = getitem(%20, 0) f32[1, 4, 136]
| %22 = tile(outputs=[%21], program=#1, inputs=[%3, %15]) (None, (f32[1, 4, 136]))
| %23 = getitem(%22, 1) (f32[1, 4, 136])
| %24 = getitem(%23, 0) f32[1, 4, 136]
| %25 = sum(%24, [0]) f32[4, 136]
| %26 = convert_element_type(%25, bf16) bf16[4, 136]
| %27 = view(%6, [160, 264]) bf16[160, 264]
%28 = permute(%0, [1, 0]) bf16[136, 264]
| %29 = permute(%28, [1, 0]) bf16[264, 136]
| %30 = lora_fx.tile_outputs(#2, %15, 160) (bf16[160, 136])
| %31 = getitem(%30, 0) bf16[160, 136]
| %32 = tile(outputs=[%31], program=#2, inputs=[%15, %1]) (None, (bf16[160, 136]))
| %33 = getitem(%32, 1) (bf16[160, 136])
| %34 = getitem(%33, 0) bf16[160, 136]
| %35 = auto_functionalized(lora_fx.accumulate_, base=%34, a=%27, b=%29, scale=None) (None, bf16[160, 136])
| %36 = getitem(%35, 1) bf16[160, 136]
| %37 = view(%36, [2, 80, 136]) bf16[2, 80, 136]
return None, %37, None, None, %26, %19
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
%43 = sum(%42, [0]) f32[160, 4]
%44 = convert_element_type(%43, bf16) bf16[160, 4]
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
| %41 = tile(outputs=[%39, %35, %40], program=#1, inputs=[%12, %2, %11, %10, %15, %5, %14, %13, %27, %7, %35])
        (None, (f32[1, 4, 264], bf16[160, 264], bf16[160, 264]))
| %42 = getitem(%41, 1) (f32[1, 4, 264], bf16[160, 264], bf16[160, 264])
| %43 = getitem(%42, 0) f32[1, 4, 264]
| %44 = sum(%43, [0]) f32[4, 264]
| %45 = convert_element_type(%44, bf16) bf16[4, 264]
| %46 = getitem(%42, 1) bf16[160, 264]
| %47 = reshape(%46, [2, 80, 264]) bf16[2, 80, 264]
| %48 = lora_fx.tile_outputs(#2, %46, 160) (f32[9, 160, 4], f32[1, 264, 4])
| %49 = getitem(%48, 0) f32[9, 160, 4]
| %50 = getitem(%48, 1) f32[1, 264, 4]
| %51 = tile(outputs=[%49, %50], program=#2, inputs=[%46, %5, %15]) (None, (f32[9, 160, 4], f32[1, 264, 4]))
| %52 = getitem(%51, 1) (f32[9, 160, 4], f32[1, 264, 4])
| %53 = getitem(%52, 0) f32[9, 160, 4]
| %54 = sum(%53, [0]) f32[160, 4]
| %55 = mul(%54, %14) f32[160, 4]
| %56 = convert_element_type(%55, bf16) bf16[160, 4]
| %57 = getitem(%52, 1) f32[1, 264, 4]
| %58 = sum(%57, [0]) f32[264, 4]
| %59 = mul(%58, %14) f32[264, 4]
| %60 = convert_element_type(%59, bf16) bf16[264, 4]
| %61 = view(%47, [160, 264]) bf16[160, 264]
| %62 = getitem(%42, 2) bf16[160, 264]
| %63 = reshape(%62, [2, 80, 264]) bf16[2, 80, 264]
| %64 = lora_fx.tile_outputs(#2, %62, 160) (f32[9, 160, 4], f32[1, 264, 4])
| %65 = getitem(%64, 0) f32[9, 160, 4]
| %66 = getitem(%64, 1) f32[1, 264, 4]
| %67 = tile(outputs=[%65, %66], program=#2, inputs=[%62, %2, %12]) (None, (f32[9, 160, 4], f32[1, 264, 4]))
| %68 = getitem(%67, 1) (f32[9, 160, 4], f32[1, 264, 4])
| %69 = getitem(%68, 0) f32[9, 160, 4]
| %70 = sum(%69, [0]) f32[160, 4]
| %71 = mul(%70, %11) f32[160, 4]
| %72 = convert_element_type(%71, bf16) bf16[160, 4]
| %73 = getitem(%68, 1) f32[1, 264, 4]
| %74 = sum(%73, [0]) f32[264, 4]
| %75 = mul(%74, %11) f32[264, 4]
| %76 = convert_element_type(%75, bf16) bf16[264, 4]
| %77 = cat([%72, %56], 1) bf16[160, 8]
| %78 = lora_fx.tile_outputs(#3, %9, 160) (f32[1, 8, 136])
| %79 = getitem(%78, 0) f32[1, 8, 136]
| %80 = tile(outputs=[%79], program=#3, inputs=[%9, %77]) (None, (f32[1, 8, 136]))
| %81 = getitem(%80, 1) (f32[1, 8, 136])
| %82 = getitem(%81, 0) f32[1, 8, 136]
| %83 = sum(%82, [0]) f32[8, 136]
| %84 = convert_element_type(%83, bf16) bf16[8, 136]
| %85 = slice(%84, 0, 4, 8) bf16[4, 136]
| %86 = slice(%84, 0, 0, 4) bf16[4, 136]
%87 = cat([%1, %4], 0) bf16[8, 136]
| %88 = view(%63, [160, 264]) bf16[160, 264]
%89 = permute(%0, [1, 0]) bf16[136, 264]
| %90 = permute(%89, [1, 0]) bf16[264, 136]
| %91 = mm(%88, %90) bf16[160, 136]
| %92 = lora_fx.tile_outputs(#4, %77, 160) (bf16[160, 136])
| %93 = getitem(%92, 0) bf16[160, 136]
| %94 = tile(outputs=[%93], program=#4, inputs=[%77, %87]) (None, (bf16[160, 136]))
| %95 = getitem(%94, 1) (bf16[160, 136])
| %96 = getitem(%95, 0) bf16[160, 136]
| %97 = auto_functionalized(lora_fx.accumulate_, base=%96, a=%61, b=%37, scale=None) (None, bf16[160, 136])
| %98 = getitem(%97, 1) bf16[160, 136]
| %99 = add(%98, %91) bf16[160, 136]
| %100 = reshape(%99, [2, 80, 136]) bf16[2, 80, 136]
return None, %100, None, None, %86, %76, None, None, None, %85, %60, None, None, None, %45, %31
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
