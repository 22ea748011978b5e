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
| %37 = lora_fx.tile_outputs(#0, %19, 160) (f32[5, 160, 4], f32[1, 136, 4])
| %38 = getitem(%37, 0) f32[5, 160, 4]
| %39 = getitem(%37, 1) f32[1, 136, 4]
| %40 = tile(outputs=[%38, %39], program=#0, inputs=[%19, %7, %15]) (None, (f32[5, 160, 4], f32[1, 136, 4]))
| %41 = getitem(%40, 1) (f32[5, 160, 4], f32[1, 136, 4])
| %42 = getitem(%41, 0) f32[5, 160, 4]
| %43 = sum(%42, [0]) f32[160, 4]
| %44 = mul(%43, %14) f32[160, 4]
| %45 = convert_element_type(%44, bf16) bf16[160, 4]
| %46 = getitem(%41, 1) f32[1, 136, 4]
| %47 = sum(%46, [0]) f32[136, 4]
| %48 = mul(%47, %14) f32[136, 4]
| %49 = convert_element_type(%48, bf16) bf16[136, 4]
| %50 = view(%19, [160, 136]) bf16[160, 136]
%51 = permute(%5, [1, 0]) bf16[136, 136]
| %52 = permute(%51, [1, 0]) bf16[136, 136]
| %53 = mm(%50, %52) bf16[160, 136]
| %54 = lora_fx.tile_outputs(#0, %18, 160) (f32[5, 160, 4], f32[1, 136, 4])
| %55 = getitem(%54, 0) f32[5, 160, 4]
| %56 = getitem(%54, 1) f32[1, 136, 4]
| %57 = tile(outputs=[%55, %56], program=#0, inputs=[%18, %4, %13]) (None, (f32[5, 160, 4], f32[1, 136, 4]))
| %58 = getitem(%57, 1) (f32[5, 160, 4], f32[1, 136, 4])
| %59 = getitem(%58, 0) f32[5, 160, 4]
| %60 = sum(%59, [0]) f32[160, 4]
| %61 = mul(%60, %12) f32[160, 4]
| %62 = convert_element_type(%61, bf16) bf16[160, 4]
| %63 = getitem(%58, 1) f32[1, 136, 4]
| %64 = sum(%63, [0]) f32[136, 4]
| %65 = mul(%64, %12) f32[136, 4]
| %66 = convert_element_type(%65, bf16) bf16[136, 4]
| %67 = cat([%62, %45, %29], 1) bf16[160, 12]
%68 = convert_element_type(%1, f32) f32[2, 80, 136]
| %69 = lora_fx.tile_outputs(#1, %1, 160) (f32[1, 12, 136])
| %70 = getitem(%69, 0) f32[1, 12, 136]
| %71 = tile(outputs=[%70], program=#1, inputs=[%1, %11, %0, %67]) (None, (f32[1, 12, 136]))
| %72 = getitem(%71, 1) (f32[1, 12, 136])
| %73 = getitem(%72, 0) f32[1, 12, 136]
| %74 = sum(%73, [0]) f32[12, 136]
| %75 = convert_element_type(%74, bf16) bf16[12, 136]
| %76 = slice(%75, 0, 8, 12) bf16[4, 136]
| %77 = slice(%75, 0, 4, 8) bf16[4, 136]
| %78 = slice(%75, 0, 0, 4) bf16[4, 136]
%79 = cat([%3, %6, %9], 0) bf16[12, 136]
| %80 = view(%18, [160, 136]) bf16[160, 136]
%81 = permute(%2, [1, 0]) bf16[136, 136]
| %82 = permute(%81, [1, 0]) bf16[136, 136]
| %83 = mm(%80, %82) bf16[160, 136]
| %84 = lora_fx.tile_outputs(#2, %67, 160) (bf16[160, 136])
| %85 = getitem(%84, 0) bf16[160, 136]
| %86 = tile(outputs=[%85], program=#2, inputs=[%67, %79]) (None, (bf16[160, 136]))
| %87 = getitem(%86, 1) (bf16[160, 136])
| %88 = getitem(%87, 0) bf16[160, 136]
| %89 = auto_functionalized(lora_fx.accumulate_, base=%88, a=%34, b=%36, scale=None) (None, bf16[160, 136])
| %90 = getitem(%89, 1) bf16[160, 136]
| %91 = add(%90, %53) bf16[160, 136]
| %92 = add(%91, %83) bf16[160, 136]
| %93 = reshape(%92, [2, 80, 136]) bf16[2, 80, 136]
| %94 = convert_element_type(%93, f32) f32[2, 80, 136]
| %95 = mul(%94, %0) f32[2, 80, 136]
| %96 = mul(%95, %68) f32[2, 80, 136]
| %97 = mul(%95, %11) f32[2, 80, 136]
| %98 = sum(%96, [2], True) f32[2, 80, 1]
| %99 = pow(%11, 3) f32[2, 80, 1]
| %100 = mul(%98, -0.5) f32[2, 80, 1]
| %101 = mul(%100, %99) f32[2, 80, 1]
| %102 = expand(%101, [2, 80, 136]) f32[2, 80, 136]
| %103 = div(%102, 136) f32[2, 80, 136]
| %104 = pow(%68, 1.0) f32[2, 80, 136]
| %105 = mul(%104, 2.0) f32[2, 80, 136]
| %106 = mul(%103, %105) f32[2, 80, 136]
| %107 = add(%97, %106) f32[2, 80, 136]
| %108 = convert_element_type(%107, bf16) bf16[2, 80, 136]
return None, %108, None, None, None, %78, %66, None, None, None, %77, %49, None, None, None, %76, %33
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
