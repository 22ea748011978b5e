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
%27 = _foreach_mul([%3, %8, %13], [%4, %9, %14]) (f32[], f32[], f32[])
%28 = getitem(%27, 0) f32[]
%29 = getitem(%27, 1) f32[]
%30 = getitem(%27, 2) f32[]
%31 = cat([%5, %10, %15], 0) bf16[12, 136]
%32 = lora_fx.tile_outputs(#0, %24, 160) (bf16[160, 12])
%33 = getitem(%32, 0) bf16[160, 12]
%34 = tile(outputs=[%33], program=#0, inputs=[%24, %31]) (None, (bf16[160, 12]))
%35 = getitem(%34, 1) (bf16[160, 12])
%36 = getitem(%35, 0) bf16[160, 12]
%37 = slice(%36, 1, 0, 4) bf16[160, 4]
%38 = lora_fx.tile_outputs(#1, %37, 160) (bf16[160, 136])
%39 = getitem(%38, 0) bf16[160, 136]
%40 = tile(outputs=[%39], program=#1, inputs=[%37, %6, %28]) (None, (bf16[160, 136]))
%41 = getitem(%40, 1) (bf16[160, 136])
%42 = getitem(%41, 0) bf16[160, 136]
%43 = auto_functionalized(lora_fx.accumulate_, base=%42, a=%26, b=%25, scale=None) (None, bf16[160, 136])
%44 = getitem(%43, 1) bf16[160, 136]
%45 = view(%44, [2, 80, 136]) bf16[2, 80, 136]
%46 = permute(%7, [1, 0]) bf16[136, 136]
%47 = slice(%36, 1, 4, 8) bf16[160, 4]
%48 = lora_fx.tile_outputs(#1, %47, 160) (bf16[160, 136])
%49 = getitem(%48, 0) bf16[160, 136]
%50 = tile(outputs=[%49], program=#1, inputs=[%47, %11, %29]) (None, (bf16[160, 136]))
%51 = getitem(%50, 1) (bf16[160, 136])
%52 = getitem(%51, 0) bf16[160, 136]
%53 = auto_functionalized(lora_fx.accumulate_, base=%52, a=%26, b=%46, scale=None) (None, bf16[160, 136])
%54 = getitem(%53, 1) bf16[160, 136]
%55 = view(%54, [2, 80, 136]) bf16[2, 80, 136]
%56 = permute(%12, [1, 0]) bf16[136, 136]
%57 = slice(%36, 1, 8, 12) bf16[160, 4]
%58 = lora_fx.tile_outputs(#1, %57, 160) (bf16[160, 136])
%59 = getitem(%58, 0) bf16[160, 136]
%60 = tile(outputs=[%59], program=#1, inputs=[%57, %16, %30]) (None, (bf16[160, 136]))
%61 = getitem(%60, 1) (bf16[160, 136])
%62 = getitem(%61, 0) bf16[160, 136]
%63 = auto_functionalized(lora_fx.accumulate_, base=%62, a=%26, b=%56, scale=None) (None, bf16[160, 136])
%64 = getitem(%63, 1) bf16[160, 136]
%65 = view(%64, [2, 80, 136]) bf16[2, 80, 136]
return %45, %55, %65, %0, %1, %2, %5, %6, %7, %10, %11, %12, %15, %16, %21, %28, %37, %29, %47, %30, %57
#0: bfloat16, 136 columns; in0 full, in1 factor 12 RN
    0: load in0
    1: down %0 in1
#1: bfloat16, 136 columns; in0 thin 4, in1 factor 4 NR, in2 number
    0: product in0 in1 in2
    1: store %0 bfloat16""",
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
| %21 = lora_fx.tile_outputs(#0, %20, 160) (f32[5, 160, 4], f32[1, 136, 4])
| %22 = getitem(%21, 0) f32[5, 160, 4]
| %23 = getitem(%21, 1) f32[1, 136, 4]
| %24 = tile(outputs=[%22, %23], program=#0, inputs=[%20, %10, %17]) (None, (f32[5, 160, 4], f32[1, 136, 4]))
| %25 = getitem(%24, 1) (f32[5, 160, 4], f32[1, 136, 4])
| %26 = getitem(%25, 0) f32[5, 160, 4]
| %27 = lora_fx.sum_parts([%26], [%16], bf16) (bf16[160, 4])
| %28 = getitem(%27, 0) bf16[160, 4]
| %29 = getitem(%25, 1) f32[1, 136, 4]
| %30 = view(%20, [160, 136]) bf16[160, 136]
%31 = permute(%8, [1, 0]) bf16[136, 136]
| %32 = permute(%31, [1, 0]) bf16[136, 136]
| %33 = lora_fx.tile_outputs(#0, %19, 160) (f32[5, 160, 4], f32[1, 136, 4])
| %34 = getitem(%33, 0) f32[5, 160, 4]
| %35 = getitem(%33, 1) f32[1, 136, 4]
| %36 = tile(outputs=[%34, %35], program=#0, inputs=[%19, %7, %15]) (None, (f32[5, 160, 4], f32[1, 136, 4]))
| %37 = getitem(%36, 1) (f32[5, 160, 4], f32[1, 136, 4])
| %38 = getitem(%37, 0) f32[5, 160, 4]
| %39 = lora_fx.sum_parts([%38], [%14], bf16) (bf16[160, 4])
| %40 = getitem(%39, 0) bf16[160, 4]
| %41 = getitem(%37, 1) f32[1, 136, 4]
| %42 = view(%19, [160, 136]) bf16[160, 136]
%43 = permute(%5, [1, 0]) bf16[136, 136]
| %44 = permute(%43, [1, 0]) bf16[136, 136]
| %45 = mm(%42, %44) bf16[160, 136]
| %46 = lora_fx.tile_outputs(#0, %18, 160) (f32[5, 160, 4], f32[1, 136, 4])
| %47 = getitem(%46, 0) f32[5, 160, 4]
| %48 = getitem(%46, 1) f32[1, 136, 4]
| %49 = tile(outputs=[%47, %48], program=#0, inputs=[%18, %4, %13]) (None, (f32[5, 160, 4], f32[1, 136, 4]))
| %50 = getitem(%49, 1) (f32[5, 160, 4], f32[1, 136, 4])
| %51 = getitem(%50, 0) f32[5, 160, 4]
| %52 = lora_fx.sum_parts([%51], [%12], bf16) (bf16[160, 4])
| %53 = getitem(%52, 0) bf16[160, 4]
| %54 = getitem(%50, 1) f32[1, 136, 4]
| %55 = cat([%53, %40, %28], 1) bf16[160, 12]
%56 = convert_element_type(%1, f32) f32[2, 80, 136]
| %57 = lora_fx.tile_outputs(#1, %1, 160) (f32[1, 12, 136])
| %58 = getitem(%57, 0) f32[1, 12, 136]
| %59 = tile(outputs=[%58], program=#1, inputs=[%1, %11, %0, %55]) (None, (f32[1, 12, 136]))
| %60 = getitem(%59, 1) (f32[1, 12, 136])
| %61 = getitem(%60, 0) f32[1, 12, 136]
%62 = cat([%3, %6, %9], 0) bf16[12, 136]
| %63 = view(%18, [160, 136]) bf16[160, 136]
%64 = permute(%2, [1, 0]) bf16[136, 136]
| %65 = permute(%64, [1, 0]) bf16[136, 136]
| %66 = mm(%63, %65) bf16[160, 136]
| %67 = lora_fx.tile_outputs(#2, %55, 160) (bf16[160, 136])
| %68 = getitem(%67, 0) bf16[160, 136]
| %69 = tile(outputs=[%68], program=#2, inputs=[%55, %62]) (None, (bf16[160, 136]))
| %70 = getitem(%69, 1) (bf16[160, 136])
| %71 = getitem(%70, 0) bf16[160, 136]
| %72 = auto_functionalized(lora_fx.accumulate_, base=%71, a=%30, b=%32, scale=None) (None, bf16[160, 136])
| %73 = getitem(%72, 1) bf16[160, 136]
| %74 = add(%73, %45) bf16[160, 136]
| %75 = add(%74, %66) bf16[160, 136]
| %76 = reshape(%75, [2, 80, 136]) bf16[2, 80, 136]
| %77 = convert_element_type(%76, f32) f32[2, 80, 136]
| %78 = mul(%77, %0) f32[2, 80, 136]
| %79 = mul(%78, %56) f32[2, 80, 136]
| %80 = mul(%78, %11) f32[2, 80, 136]
| %81 = sum(%79, [2], True) f32[2, 80, 1]
| %82 = pow(%11, 3) f32[2, 80, 1]
| %83 = mul(%81, -0.5) f32[2, 80, 1]
| %84 = mul(%83, %82) f32[2, 80, 1]
| %85 = expand(%84, [2, 80, 136]) f32[2, 80, 136]
| %86 = div(%85, 136) f32[2, 80, 136]
| %87 = pow(%56, 1.0) f32[2, 80, 136]
| %88 = mul(%87, 2.0) f32[2, 80, 136]
| %89 = mul(%86, %88) f32[2, 80, 136]
| %90 = add(%80, %89) f32[2, 80, 136]
| %91 = convert_element_type(%90, bf16) bf16[2, 80, 136]
| %92 = lora_fx.sum_parts([%29, %41, %54, %61], [%16, %14, %12, None], bf16) (bf16[136, 4], bf16[136, 4], bf16[136,
        4], bf16[12, 136])
| %93 = getitem(%92, 0) bf16[136, 4]
| %94 = getitem(%92, 1) bf16[136, 4]
| %95 = getitem(%92, 2) bf16[136, 4]
| %96 = getitem(%92, 3) bf16[12, 136]
| %97 = slice(%96, 0, 8, 12) bf16[4, 136]
| %98 = slice(%96, 0, 4, 8) bf16[4, 136]
| %99 = slice(%96, 0, 0, 4) bf16[4, 136]
return None, %91, None, None, None, %99, %95, None, None, None, %98, %94, None, None, None, %97, %93
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
#2: bfloat16, 136 columns; in0 thin 12, in1 factor 12 RN
    0: product in0 in1
    1: store %0 bfloat16""",
    )
