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
%32 = empty([160, 12], dtype=bf16, device=cpu) bf16[160, 12]
%33 = tile(outputs=[%32], program=#0, inputs=[%24, %31]) (None, (bf16[160, 12]))
%34 = getitem(%33, 1) (bf16[160, 12])
%35 = getitem(%34, 0) bf16[160, 12]
%36 = slice(%35, 1, 0, 4) bf16[160, 4]
%37 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
%38 = tile(outputs=[%37], program=#1, inputs=[%36, %6, %28]) (None, (bf16[160, 136]))
%39 = getitem(%38, 1) (bf16[160, 136])
%40 = getitem(%39, 0) bf16[160, 136]
%41 = auto_functionalized(lora_fx.accumulate_, base=%40, a=%26, b=%25, scale=None) (None, bf16[160, 136])
%42 = getitem(%41, 1) bf16[160, 136]
%43 = view(%42, [2, 80, 136]) bf16[2, 80, 136]
%44 = permute(%7, [1, 0]) bf16[136, 136]
%45 = slice(%35, 1, 4, 8) bf16[160, 4]
%46 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
%47 = tile(outputs=[%46], program=#1, inputs=[%45, %11, %29]) (None, (bf16[160, 136]))
%48 = getitem(%47, 1) (bf16[160, 136])
%49 = getitem(%48, 0) bf16[160, 136]
%50 = auto_functionalized(lora_fx.accumulate_, base=%49, a=%26, b=%44, scale=None) (None, bf16[160, 136])
%51 = getitem(%50, 1) bf16[160, 136]
%52 = view(%51, [2, 80, 136]) bf16[2, 80, 136]
%53 = permute(%12, [1, 0]) bf16[136, 136]
%54 = slice(%35, 1, 8, 12) bf16[160, 4]
%55 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
%56 = tile(outputs=[%55], program=#1, inputs=[%54, %16, %30]) (None, (bf16[160, 136]))
%57 = getitem(%56, 1) (bf16[160, 136])
%58 = getitem(%57, 0) bf16[160, 136]
%59 = auto_functionalized(lora_fx.accumulate_, base=%58, a=%26, b=%53, scale=None) (None, bf16[160, 136])
%60 = getitem(%59, 1) bf16[160, 136]
%61 = view(%60, [2, 80, 136]) bf16[2, 80, 136]
return %43, %52, %61, %0, %1, %2, %5, %6, %7, %10, %11, %12, %15, %16, %21, %28, %36, %29, %45, %30, %54
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
| %21 = empty([5, 160, 4], dtype=f32, device=cpu) f32[5, 160, 4]
| %22 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %23 = tile(outputs=[%21, %22], program=#0, inputs=[%20, %10, %17]) (None, (f32[5, 160, 4], f32[1, 136, 4]))
| %24 = getitem(%23, 1) (f32[5, 160, 4], f32[1, 136, 4])
| %25 = getitem(%24, 0) f32[5, 160, 4]
| %26 = getitem(%24, 1) f32[1, 136, 4]
| %27 = view(%20, [160, 136]) bf16[160, 136]
%28 = permute(%8, [1, 0]) bf16[136, 136]
| %29 = permute(%28, [1, 0]) bf16[136, 136]
| %30 = empty([5, 160, 4], dtype=f32, device=cpu) f32[5, 160, 4]
| %31 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %32 = tile(outputs=[%30, %31], program=#0, inputs=[%19, %7, %15]) (None, (f32[5, 160, 4], f32[1, 136, 4]))
| %33 = getitem(%32, 1) (f32[5, 160, 4], f32[1, 136, 4])
| %34 = getitem(%33, 0) f32[5, 160, 4]
| %35 = getitem(%33, 1) f32[1, 136, 4]
| %36 = view(%19, [160, 136]) bf16[160, 136]
%37 = permute(%5, [1, 0]) bf16[136, 136]
| %38 = permute(%37, [1, 0]) bf16[136, 136]
| %39 = mm(%36, %38) bf16[160, 136]
| %40 = empty([5, 160, 4], dtype=f32, device=cpu) f32[5, 160, 4]
| %41 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %42 = tile(outputs=[%40, %41], program=#0, inputs=[%18, %4, %13]) (None, (f32[5, 160, 4], f32[1, 136, 4]))
| %43 = getitem(%42, 1) (f32[5, 160, 4], f32[1, 136, 4])
| %44 = getitem(%43, 0) f32[5, 160, 4]
| %45 = getitem(%43, 1) f32[1, 136, 4]
| %46 = lora_fx.sum_parts([%44, %34, %25], [%12, %14, %16], bf16, True) (bf16[160, 12])
| %47 = getitem(%46, 0) bf16[160, 12]
%48 = convert_element_type(%1, f32) f32[2, 80, 136]
| %49 = empty([1, 12, 136], dtype=f32, device=cpu) f32[1, 12, 136]
| %50 = tile(outputs=[%49], program=#1, inputs=[%1, %11, %0, %47]) (None, (f32[1, 12, 136]))
| %51 = getitem(%50, 1) (f32[1, 12, 136])
| %52 = getitem(%51, 0) f32[1, 12, 136]
%53 = cat([%3, %6, %9], 0) bf16[12, 136]
| %54 = view(%18, [160, 136]) bf16[160, 136]
%55 = permute(%2, [1, 0]) bf16[136, 136]
| %56 = permute(%55, [1, 0]) bf16[136, 136]
| %57 = mm(%54, %56) bf16[160, 136]
| %58 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
| %59 = tile(outputs=[%58], program=#2, inputs=[%47, %53]) (None, (bf16[160, 136]))
| %60 = getitem(%59, 1) (bf16[160, 136])
| %61 = getitem(%60, 0) bf16[160, 136]
| %62 = auto_functionalized(lora_fx.accumulate_, base=%61, a=%27, b=%29, scale=None) (None, bf16[160, 136])
| %63 = getitem(%62, 1) bf16[160, 136]
| %64 = reshape(%63, [2, 80, 136]) bf16[2, 80, 136]
| %65 = reshape(%39, [2, 80, 136]) bf16[2, 80, 136]
| %66 = add(%64, %65) bf16[2, 80, 136]
| %67 = reshape(%57, [2, 80, 136]) bf16[2, 80, 136]
| %68 = add(%66, %67) bf16[2, 80, 136]
| %69 = convert_element_type(%68, f32) f32[2, 80, 136]
| %70 = mul(%69, %0) f32[2, 80, 136]
| %71 = mul(%70, %48) f32[2, 80, 136]
| %72 = mul(%70, %11) f32[2, 80, 136]
| %73 = sum(%71, [2], True) f32[2, 80, 1]
| %74 = pow(%11, 3) f32[2, 80, 1]
| %75 = mul(%73, -0.5) f32[2, 80, 1]
| %76 = mul(%75, %74) f32[2, 80, 1]
| %77 = expand(%76, [2, 80, 136]) f32[2, 80, 136]
| %78 = div(%77, 136) f32[2, 80, 136]
| %79 = pow(%48, 1.0) f32[2, 80, 136]
| %80 = mul(%79, 2.0) f32[2, 80, 136]
| %81 = mul(%78, %80) f32[2, 80, 136]
| %82 = add(%72, %81) f32[2, 80, 136]
| %83 = convert_element_type(%82, bf16) bf16[2, 80, 136]
| %84 = lora_fx.sum_parts([%26, %35, %45, %52], [%16, %14, %12, None], bf16) (bf16[136, 4], bf16[136, 4], bf16[136,
        4], bf16[12, 136])
| %85 = getitem(%84, 0) bf16[136, 4]
| %86 = getitem(%84, 1) bf16[136, 4]
| %87 = getitem(%84, 2) bf16[136, 4]
| %88 = getitem(%84, 3) bf16[12, 136]
| %89 = slice(%88, 0, 8, 12) bf16[4, 136]
| %90 = slice(%88, 0, 4, 8) bf16[4, 136]
| %91 = slice(%88, 0, 0, 4) bf16[4, 136]
return None, %83, None, None, None, %91, %87, None, None, None, %90, %86, None, None, None, %89, %85
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
