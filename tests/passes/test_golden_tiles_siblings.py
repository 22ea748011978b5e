"""The forward and backward graphs of q, k and v of a norm after their regions have been cut out, as on a GPU.

See `tests/passes/test_golden_tiles.py`. The norm is computed again for dA in the kernel that needs it; dX of the three
is one sum, with their stacked product, in one kernel.
"""

from expecttest import assert_expected_inline

from tests.passes.on_gpu import capture, halves
from tests.passes.test_fuse_tiles import normed, x


def test_qkv_of_a_norm() -> None:
    forward, backward = halves(capture(normed(), x()))
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
%35 = tile(outputs=[%34], program=#0, inputs=[%24, %32]) (None, (f32[1, 160, 12]))
%36 = getitem(%35, 1) (f32[1, 160, 12])
%37 = getitem(%36, 0) f32[1, 160, 12]
%38 = sum(%37, [0]) f32[160, 12]
%39 = convert_element_type(%38, bf16) bf16[160, 12]
%40 = slice(%39, 1, 0, 4) bf16[160, 4]
%41 = tile(outputs=[%27], program=#1, inputs=[%40, %6, %29, %27]) (None, (bf16[160, 136]))
%42 = getitem(%41, 1) (bf16[160, 136])
%43 = getitem(%42, 0) bf16[160, 136]
%44 = view(%43, [2, 80, 136]) bf16[2, 80, 136]
%45 = permute(%7, [1, 0]) bf16[136, 136]
%46 = mm(%26, %45) bf16[160, 136]
%47 = slice(%39, 1, 4, 8) bf16[160, 4]
%48 = tile(outputs=[%46], program=#1, inputs=[%47, %11, %30, %46]) (None, (bf16[160, 136]))
%49 = getitem(%48, 1) (bf16[160, 136])
%50 = getitem(%49, 0) bf16[160, 136]
%51 = view(%50, [2, 80, 136]) bf16[2, 80, 136]
%52 = permute(%12, [1, 0]) bf16[136, 136]
%53 = mm(%26, %52) bf16[160, 136]
%54 = slice(%39, 1, 8, 12) bf16[160, 4]
%55 = tile(outputs=[%53], program=#1, inputs=[%54, %16, %31, %53]) (None, (bf16[160, 136]))
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
| %24 = tile(outputs=[%22, %23], program=#0, inputs=[%20, %10, %17]) (None, (f32[1, 160, 4], f32[1, 136, 4]))
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
| %41 = tile(outputs=[%39, %40], program=#0, inputs=[%19, %7, %15]) (None, (f32[1, 160, 4], f32[1, 136, 4]))
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
| %58 = tile(outputs=[%56, %57], program=#0, inputs=[%18, %4, %13]) (None, (f32[1, 160, 4], f32[1, 136, 4]))
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
| %72 = tile(outputs=[%71], program=#1, inputs=[%1, %11, %0, %68]) (None, (f32[1, 12, 136]))
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
| %85 = tile(outputs=[%54], program=#2, inputs=[%37, %54, %68, %80, %84]) (None, (bf16[160, 136]))
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
