"""The forward and backward graphs of q, k and v under a mask each, of a norm as it is on a GPU.

See `tests/passes/test_golden_tiles.py`. Three masks are drawn for h, three for dA and three for dX, each time in one
kernel. The kernel of dA computes the norm's output again from x and 1/rms: what Inductor's kernel of the norm's
backward shares with it (`x * rstd`) stays in the graph as well, and neither writes anything for the other. The three g
come from a kernel each and are read by one, so they are summed in one launch.
"""

from expecttest import assert_expected_inline

from tests.passes.on_gpu import capture, halves
from tests.passes.test_dropout_tiles import fused
from tests.passes.test_fuse_tiles import K, x

SHAPE = (2, 160, K)


def test_qkv_of_a_norm_with_dropout() -> None:
    forward, backward = halves(capture(fused(), x(shape=SHAPE)))
    assert_expected_inline(
        forward,
        """\
%0 = input bf16[136]
%1 = input bf16[2, 160, 136]
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
%17 = convert_element_type(%1, f32) f32[2, 160, 136]
%18 = pow(%17, 2) f32[2, 160, 136]
%19 = mean(%18, [2], True) f32[2, 160, 1]
%20 = add(%19, 1.1920928955078125e-07) f32[2, 160, 1]
%21 = rsqrt(%20) f32[2, 160, 1]
%22 = mul(%17, %21) f32[2, 160, 136]
%23 = mul(%22, %0) f32[2, 160, 136]
%24 = convert_element_type(%23, bf16) bf16[2, 160, 136]
%25 = permute(%2, [1, 0]) bf16[136, 136]
%26 = view(%24, [320, 136]) bf16[320, 136]
%27 = _foreach_mul([%3, %8, %13], [%4, %9, %14]) (f32[], f32[], f32[])
%28 = getitem(%27, 0) f32[]
%29 = getitem(%27, 1) f32[]
%30 = getitem(%27, 2) f32[]
%31 = inductor_seeds(3, cpu) i64[3]
%32 = select(%31, 0, 0) i64[]
%33 = permute(%7, [1, 0]) bf16[136, 136]
%34 = select(%31, 0, 1) i64[]
%35 = permute(%12, [1, 0]) bf16[136, 136]
%36 = select(%31, 0, 2) i64[]
%37 = empty([320, 4], dtype=bf16, device=cpu) bf16[320, 4]
%38 = empty([320, 4], dtype=bf16, device=cpu) bf16[320, 4]
%39 = empty([320, 4], dtype=bf16, device=cpu) bf16[320, 4]
%40 = tile(outputs=[%37, %38, %39], program=#0, inputs=[%32, %24, %5, %34, %10, %36, %15]) (None, (bf16[320, 4],
        bf16[320, 4], bf16[320, 4]))
%41 = getitem(%40, 1) (bf16[320, 4], bf16[320, 4], bf16[320, 4])
%42 = getitem(%41, 0) bf16[320, 4]
%43 = empty([320, 136], dtype=bf16, device=cpu) bf16[320, 136]
%44 = tile(outputs=[%43], program=#1, inputs=[%42, %6, %28]) (None, (bf16[320, 136]))
%45 = getitem(%44, 1) (bf16[320, 136])
%46 = getitem(%45, 0) bf16[320, 136]
%47 = auto_functionalized(lora_fx.accumulate_, base=%46, a=%26, b=%25, scale=None) (None, bf16[320, 136])
%48 = getitem(%47, 1) bf16[320, 136]
%49 = view(%48, [2, 160, 136]) bf16[2, 160, 136]
%50 = getitem(%41, 1) bf16[320, 4]
%51 = empty([320, 136], dtype=bf16, device=cpu) bf16[320, 136]
%52 = tile(outputs=[%51], program=#1, inputs=[%50, %11, %29]) (None, (bf16[320, 136]))
%53 = getitem(%52, 1) (bf16[320, 136])
%54 = getitem(%53, 0) bf16[320, 136]
%55 = auto_functionalized(lora_fx.accumulate_, base=%54, a=%26, b=%33, scale=None) (None, bf16[320, 136])
%56 = getitem(%55, 1) bf16[320, 136]
%57 = view(%56, [2, 160, 136]) bf16[2, 160, 136]
%58 = getitem(%41, 2) bf16[320, 4]
%59 = empty([320, 136], dtype=bf16, device=cpu) bf16[320, 136]
%60 = tile(outputs=[%59], program=#1, inputs=[%58, %16, %30]) (None, (bf16[320, 136]))
%61 = getitem(%60, 1) (bf16[320, 136])
%62 = getitem(%61, 0) bf16[320, 136]
%63 = auto_functionalized(lora_fx.accumulate_, base=%62, a=%26, b=%35, scale=None) (None, bf16[320, 136])
%64 = getitem(%63, 1) bf16[320, 136]
%65 = view(%64, [2, 160, 136]) bf16[2, 160, 136]
return %49, %57, %65, %0, %1, %2, %5, %6, %7, %10, %11, %12, %15, %16, %21, %28, %32, %42, %29, %34, %50, %30, %36,
        %58
#0: bfloat16, 136 columns; in0 seed, in1 full, in2 factor 4 RN, in3 seed, in4 factor 4 RN, in5 seed, in6 factor 4 RN
    0: keep in0 0.25
    1: load in1
    2: op mul %0 1.3333333333333333
    3: op mul %1 %2
    4: down %3 in2
    5: keep in3 0.25
    6: op mul %5 1.3333333333333333
    7: op mul %1 %6
    8: down %7 in4
    9: keep in5 0.25
    10: op mul %9 1.3333333333333333
    11: op mul %1 %10
    12: down %11 in6
#1: bfloat16, 136 columns; in0 thin 4, in1 factor 4 NR, in2 number
    0: product in0 in1 in2
    1: store %0 bfloat16""",
    )
    assert_expected_inline(
        backward,
        """\
%0 = input bf16[136]
%1 = input bf16[2, 160, 136]
%2 = input bf16[136, 136]
%3 = input bf16[4, 136]
%4 = input bf16[136, 4]
%5 = input bf16[136, 136]
%6 = input bf16[4, 136]
%7 = input bf16[136, 4]
%8 = input bf16[136, 136]
%9 = input bf16[4, 136]
%10 = input bf16[136, 4]
%11 = input f32[2, 160, 1]
%12 = input f32[]
%13 = input i64[]
%14 = input bf16[320, 4]
%15 = input f32[]
%16 = input i64[]
%17 = input bf16[320, 4]
%18 = input f32[]
%19 = input i64[]
%20 = input bf16[320, 4]
| %21 = tangent bf16[2, 160, 136]
| %22 = tangent bf16[2, 160, 136]
| %23 = tangent bf16[2, 160, 136]
| %24 = empty([5, 320, 4], dtype=f32, device=cpu) f32[5, 320, 4]
| %25 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %26 = tile(outputs=[%24, %25], program=#0, inputs=[%23, %10, %20]) (None, (f32[5, 320, 4], f32[1, 136, 4]))
| %27 = getitem(%26, 1) (f32[5, 320, 4], f32[1, 136, 4])
| %28 = getitem(%27, 0) f32[5, 320, 4]
| %29 = getitem(%27, 1) f32[1, 136, 4]
%30 = convert_element_type(%1, f32) f32[2, 160, 136]
%31 = mul(%30, %11) f32[2, 160, 136]
| %32 = view(%23, [320, 136]) bf16[320, 136]
%33 = permute(%8, [1, 0]) bf16[136, 136]
| %34 = permute(%33, [1, 0]) bf16[136, 136]
| %35 = empty([5, 320, 4], dtype=f32, device=cpu) f32[5, 320, 4]
| %36 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %37 = tile(outputs=[%35, %36], program=#0, inputs=[%22, %7, %17]) (None, (f32[5, 320, 4], f32[1, 136, 4]))
| %38 = getitem(%37, 1) (f32[5, 320, 4], f32[1, 136, 4])
| %39 = getitem(%38, 0) f32[5, 320, 4]
| %40 = getitem(%38, 1) f32[1, 136, 4]
| %41 = view(%22, [320, 136]) bf16[320, 136]
%42 = permute(%5, [1, 0]) bf16[136, 136]
| %43 = permute(%42, [1, 0]) bf16[136, 136]
| %44 = mm(%41, %43) bf16[320, 136]
| %45 = empty([5, 320, 4], dtype=f32, device=cpu) f32[5, 320, 4]
| %46 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %47 = tile(outputs=[%45, %46], program=#0, inputs=[%21, %4, %14]) (None, (f32[5, 320, 4], f32[1, 136, 4]))
| %48 = getitem(%47, 1) (f32[5, 320, 4], f32[1, 136, 4])
| %49 = getitem(%48, 0) f32[5, 320, 4]
| %50 = lora_fx.sum_parts([%28, %39, %49], [%18, %15, %12], bf16) (bf16[320, 4], bf16[320, 4], bf16[320, 4])
| %51 = getitem(%50, 0) bf16[320, 4]
| %52 = getitem(%50, 1) bf16[320, 4]
| %53 = getitem(%50, 2) bf16[320, 4]
| %54 = getitem(%48, 1) f32[1, 136, 4]
| %55 = empty([1, 4, 136], dtype=f32, device=cpu) f32[1, 4, 136]
| %56 = empty([1, 4, 136], dtype=f32, device=cpu) f32[1, 4, 136]
| %57 = empty([1, 4, 136], dtype=f32, device=cpu) f32[1, 4, 136]
| %58 = tile(outputs=[%55, %56, %57], program=#1, inputs=[%1, %11, %0, %19, %51, %16, %52, %13, %53]) (None, (f32[1,
        4, 136], f32[1, 4, 136], f32[1, 4, 136]))
| %59 = getitem(%58, 1) (f32[1, 4, 136], f32[1, 4, 136], f32[1, 4, 136])
| %60 = getitem(%59, 0) f32[1, 4, 136]
| %61 = getitem(%59, 1) f32[1, 4, 136]
| %62 = getitem(%59, 2) f32[1, 4, 136]
| %63 = view(%21, [320, 136]) bf16[320, 136]
%64 = permute(%2, [1, 0]) bf16[136, 136]
| %65 = permute(%64, [1, 0]) bf16[136, 136]
| %66 = mm(%63, %65) bf16[320, 136]
| %67 = empty([320, 136], dtype=bf16, device=cpu) bf16[320, 136]
| %68 = tile(outputs=[%67], program=#2, inputs=[%19, %51, %9, %16, %52, %6, %13, %53, %3]) (None, (bf16[320, 136]))
| %69 = getitem(%68, 1) (bf16[320, 136])
| %70 = getitem(%69, 0) bf16[320, 136]
| %71 = auto_functionalized(lora_fx.accumulate_, base=%70, a=%32, b=%34, scale=None) (None, bf16[320, 136])
| %72 = getitem(%71, 1) bf16[320, 136]
| %73 = reshape(%72, [2, 160, 136]) bf16[2, 160, 136]
| %74 = reshape(%44, [2, 160, 136]) bf16[2, 160, 136]
| %75 = add(%73, %74) bf16[2, 160, 136]
| %76 = reshape(%66, [2, 160, 136]) bf16[2, 160, 136]
| %77 = add(%75, %76) bf16[2, 160, 136]
%78 = convert_element_type(%77, f32) f32[2, 160, 136]
%79 = convert_element_type(%0, f32) f32[136]
%80 = mul(%78, %79) f32[2, 160, 136]
%81 = mul(%31, %80) f32[2, 160, 136]
%82 = sum(%81, [2], True) f32[2, 160, 1]
%83 = div(%31, 136) f32[2, 160, 136]
%84 = mul(%83, %82) f32[2, 160, 136]
%85 = sub(%80, %84) f32[2, 160, 136]
%86 = mul(%85, %11) f32[2, 160, 136]
%87 = convert_element_type(%86, bf16) bf16[2, 160, 136]
| %88 = lora_fx.sum_parts([%29, %40, %54, %60, %61, %62], [%18, %15, %12, None, None, None], bf16) (bf16[136, 4],
        bf16[136, 4], bf16[136, 4], bf16[4, 136], bf16[4, 136], bf16[4, 136])
| %89 = getitem(%88, 0) bf16[136, 4]
| %90 = getitem(%88, 1) bf16[136, 4]
| %91 = getitem(%88, 2) bf16[136, 4]
| %92 = getitem(%88, 3) bf16[4, 136]
| %93 = getitem(%88, 4) bf16[4, 136]
| %94 = getitem(%88, 5) bf16[4, 136]
return None, %87, None, None, None, %94, %91, None, None, None, %93, %90, None, None, None, %92, %89
#0: bfloat16, 136 columns; in0 full, in1 factor 4 NR, in2 thin 4
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 136 columns; in0 full, in1 row, in2 column, in3 seed, in4 thin 4, in5 seed, in6 thin 4, in7 seed, in8
        thin 4
    0: load in0
    1: load in1
    2: op mul %0 %1
    3: load in2
    4: op mul %2 %3
    5: keep in3 0.25
    6: op mul %5 1.3333333333333333
    7: op mul %4 %6
    8: across %7 in4 RN
    9: keep in5 0.25
    10: op mul %9 1.3333333333333333
    11: op mul %4 %10
    12: across %11 in6 RN
    13: keep in7 0.25
    14: op mul %13 1.3333333333333333
    15: op mul %4 %14
    16: across %15 in8 RN
#2: bfloat16, 136 columns; in0 seed, in1 thin 4, in2 factor 4 RN, in3 seed, in4 thin 4, in5 factor 4 RN, in6 seed,
        in7 thin 4, in8 factor 4 RN
    0: keep in0 0.25
    1: product in1 in2
    2: op mul %0 1.3333333333333333
    3: op mul %1 %2
    4: keep in3 0.25
    5: product in4 in5
    6: op mul %4 1.3333333333333333
    7: op mul %5 %6
    8: op add %3 %7
    9: keep in6 0.25
    10: product in7 in8
    11: op mul %9 1.3333333333333333
    12: op mul %10 %11
    13: op add %8 %12
    14: store %13 bfloat16""",
    )
