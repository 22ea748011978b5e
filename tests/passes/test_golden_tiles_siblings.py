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
%31 = empty([160, 12], dtype=bf16, device=cpu) bf16[160, 12]
%32 = tile(outputs=[%31], program=#0, inputs=[%24, %5, %10, %15]) (None, (bf16[160, 12]))
%33 = getitem(%32, 1) (bf16[160, 12])
%34 = getitem(%33, 0) bf16[160, 12]
%35 = slice(%34, 1, 0, 4) bf16[160, 4]
%36 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
%37 = permute(%7, [1, 0]) bf16[136, 136]
%38 = slice(%34, 1, 4, 8) bf16[160, 4]
%39 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
%40 = permute(%12, [1, 0]) bf16[136, 136]
%41 = slice(%34, 1, 8, 12) bf16[160, 4]
%42 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
%43 = tile(outputs=[%36, %39, %42], inputs=[%35, %6, %28, %38, %11, %29, %41, %16, %30], program=#1+#1+#1) (None,
        (bf16[160, 136], bf16[160, 136], bf16[160, 136]))
%44 = getitem(%43, 1) (bf16[160, 136], bf16[160, 136], bf16[160, 136])
%45 = getitem(%44, 0) bf16[160, 136]
%46 = auto_functionalized(lora_fx.accumulate_, base=%45, a=%26, b=%25, scale=None, beta=2.0) (None, bf16[160, 136])
%47 = getitem(%46, 1) bf16[160, 136]
%48 = view(%47, [2, 80, 136]) bf16[2, 80, 136]
%49 = getitem(%44, 1) bf16[160, 136]
%50 = auto_functionalized(lora_fx.accumulate_, base=%49, a=%26, b=%37, scale=None, beta=2.0) (None, bf16[160, 136])
%51 = getitem(%50, 1) bf16[160, 136]
%52 = view(%51, [2, 80, 136]) bf16[2, 80, 136]
%53 = getitem(%44, 2) bf16[160, 136]
%54 = auto_functionalized(lora_fx.accumulate_, base=%53, a=%26, b=%40, scale=None, beta=2.0) (None, bf16[160, 136])
%55 = getitem(%54, 1) bf16[160, 136]
%56 = view(%55, [2, 80, 136]) bf16[2, 80, 136]
return %48, %52, %56, %0, %1, %2, %5, %6, %7, %10, %11, %12, %15, %16, %21, %28, %35, %29, %38, %30, %41
#0: bfloat16, 136 columns; in0 full, in1 factor 4 RN, in2 factor 4 RN, in3 factor 4 RN
    0: load in0
    1: down %0 in1|in2|in3
#1: bfloat16, 136 columns; in0 thin 4, in1 factor 4 NR, in2 number
    0: product in0 in1 in2
    1: op mul %0 0.5
    2: store %1 bfloat16""",
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
| %23 = view(%20, [160, 136]) bf16[160, 136]
%24 = permute(%8, [1, 0]) bf16[136, 136]
| %25 = permute(%24, [1, 0]) bf16[136, 136]
| %26 = empty([5, 160, 4], dtype=f32, device=cpu) f32[5, 160, 4]
| %27 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %28 = view(%19, [160, 136]) bf16[160, 136]
%29 = permute(%5, [1, 0]) bf16[136, 136]
| %30 = permute(%29, [1, 0]) bf16[136, 136]
| %31 = mm(%28, %30) bf16[160, 136]
| %32 = empty([5, 160, 4], dtype=f32, device=cpu) f32[5, 160, 4]
| %33 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %34 = tile(outputs=[%21, %22, %26, %27, %32, %33], inputs=[%20, %10, %17, %19, %7, %15, %18, %4, %13],
        program=#0+#0+#0) (None, (f32[5, 160, 4], f32[1, 136, 4], f32[5, 160, 4], f32[1, 136, 4], f32[5, 160, 4],
        f32[1, 136, 4]))
| %35 = getitem(%34, 1) (f32[5, 160, 4], f32[1, 136, 4], f32[5, 160, 4], f32[1, 136, 4], f32[5, 160, 4], f32[1, 136,
        4])
| %36 = getitem(%35, 0) f32[5, 160, 4]
| %37 = getitem(%35, 1) f32[1, 136, 4]
| %38 = getitem(%35, 2) f32[5, 160, 4]
| %39 = getitem(%35, 3) f32[1, 136, 4]
| %40 = getitem(%35, 4) f32[5, 160, 4]
| %41 = getitem(%35, 5) f32[1, 136, 4]
| %42 = lora_fx.sum_parts([%40, %38, %36], [%12, %14, %16], bf16, True) (bf16[160, 12])
| %43 = getitem(%42, 0) bf16[160, 12]
%44 = convert_element_type(%1, f32) f32[2, 80, 136]
| %45 = empty([1, 12, 136], dtype=f32, device=cpu) f32[1, 12, 136]
| %46 = view(%18, [160, 136]) bf16[160, 136]
%47 = permute(%2, [1, 0]) bf16[136, 136]
| %48 = permute(%47, [1, 0]) bf16[136, 136]
| %49 = mm(%46, %48) bf16[160, 136]
| %50 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
| %51 = tile(outputs=[%45, %50], inputs=[%1, %11, %0, %43, %43, %3, %6, %9], program=#1+#2) (None, (f32[1, 12, 136],
        bf16[160, 136]))
| %52 = getitem(%51, 1) (f32[1, 12, 136], bf16[160, 136])
| %53 = getitem(%52, 0) f32[1, 12, 136]
| %54 = getitem(%52, 1) bf16[160, 136]
| %55 = auto_functionalized(lora_fx.accumulate_, base=%54, a=%23, b=%25, scale=None, beta=2.0) (None, bf16[160,
        136])
| %56 = getitem(%55, 1) bf16[160, 136]
| %57 = reshape(%56, [2, 80, 136]) bf16[2, 80, 136]
| %58 = reshape(%31, [2, 80, 136]) bf16[2, 80, 136]
| %59 = add(%57, %58) bf16[2, 80, 136]
| %60 = reshape(%49, [2, 80, 136]) bf16[2, 80, 136]
| %61 = add(%59, %60) bf16[2, 80, 136]
| %62 = convert_element_type(%61, f32) f32[2, 80, 136]
| %63 = mul(%62, %0) f32[2, 80, 136]
| %64 = mul(%63, %44) f32[2, 80, 136]
| %65 = mul(%63, %11) f32[2, 80, 136]
| %66 = sum(%64, [2], True) f32[2, 80, 1]
| %67 = pow(%11, 3) f32[2, 80, 1]
| %68 = mul(%66, -0.5) f32[2, 80, 1]
| %69 = mul(%68, %67) f32[2, 80, 1]
| %70 = expand(%69, [2, 80, 136]) f32[2, 80, 136]
| %71 = div(%70, 136) f32[2, 80, 136]
| %72 = pow(%44, 1.0) f32[2, 80, 136]
| %73 = mul(%72, 2.0) f32[2, 80, 136]
| %74 = mul(%71, %73) f32[2, 80, 136]
| %75 = add(%65, %74) f32[2, 80, 136]
| %76 = convert_element_type(%75, bf16) bf16[2, 80, 136]
| %77 = lora_fx.sum_parts([%37, %39, %41, %53], [%16, %14, %12, None], bf16) (bf16[136, 4], bf16[136, 4], bf16[136,
        4], bf16[12, 136])
| %78 = getitem(%77, 0) bf16[136, 4]
| %79 = getitem(%77, 1) bf16[136, 4]
| %80 = getitem(%77, 2) bf16[136, 4]
| %81 = getitem(%77, 3) bf16[12, 136]
| %82 = slice(%81, 0, 8, 12) bf16[4, 136]
| %83 = slice(%81, 0, 4, 8) bf16[4, 136]
| %84 = slice(%81, 0, 0, 4) bf16[4, 136]
return None, %76, None, None, None, %84, %80, None, None, None, %83, %79, None, None, None, %82, %78
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
#2: bfloat16, 136 columns; in0 thin 12, in1 factor 4 RN, in2 factor 4 RN, in3 factor 4 RN
    0: product in0 in1|in2|in3
    1: op mul %0 0.5
    2: store %1 bfloat16""",
    )
