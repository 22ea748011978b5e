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
%44 = getitem(%41, 1) bf16[320, 4]
%45 = empty([320, 136], dtype=bf16, device=cpu) bf16[320, 136]
%46 = getitem(%41, 2) bf16[320, 4]
%47 = empty([320, 136], dtype=bf16, device=cpu) bf16[320, 136]
%48 = tile(outputs=[%43, %45, %47], inputs=[%42, %6, %28, %44, %11, %29, %46, %16, %30], program=#1+#1+#1) (None,
        (bf16[320, 136], bf16[320, 136], bf16[320, 136]))
%49 = getitem(%48, 1) (bf16[320, 136], bf16[320, 136], bf16[320, 136])
%50 = getitem(%49, 0) bf16[320, 136]
%51 = auto_functionalized(lora_fx.accumulate_, base=%50, a=%26, b=%25, scale=None, beta=2.0) (None, bf16[320, 136])
%52 = getitem(%51, 1) bf16[320, 136]
%53 = view(%52, [2, 160, 136]) bf16[2, 160, 136]
%54 = getitem(%49, 1) bf16[320, 136]
%55 = auto_functionalized(lora_fx.accumulate_, base=%54, a=%26, b=%33, scale=None, beta=2.0) (None, bf16[320, 136])
%56 = getitem(%55, 1) bf16[320, 136]
%57 = view(%56, [2, 160, 136]) bf16[2, 160, 136]
%58 = getitem(%49, 2) bf16[320, 136]
%59 = auto_functionalized(lora_fx.accumulate_, base=%58, a=%26, b=%35, scale=None, beta=2.0) (None, bf16[320, 136])
%60 = getitem(%59, 1) bf16[320, 136]
%61 = view(%60, [2, 160, 136]) bf16[2, 160, 136]
return %53, %57, %61, %0, %1, %2, %5, %6, %7, %10, %11, %12, %15, %16, %21, %28, %32, %42, %29, %34, %44, %30, %36,
        %46
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
    1: op mul %0 0.5
    2: store %1 bfloat16""",
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
%26 = convert_element_type(%1, f32) f32[2, 160, 136]
%27 = mul(%26, %11) f32[2, 160, 136]
| %28 = view(%23, [320, 136]) bf16[320, 136]
%29 = permute(%8, [1, 0]) bf16[136, 136]
| %30 = permute(%29, [1, 0]) bf16[136, 136]
| %31 = empty([5, 320, 4], dtype=f32, device=cpu) f32[5, 320, 4]
| %32 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %33 = view(%22, [320, 136]) bf16[320, 136]
%34 = permute(%5, [1, 0]) bf16[136, 136]
| %35 = permute(%34, [1, 0]) bf16[136, 136]
| %36 = mm(%33, %35) bf16[320, 136]
| %37 = empty([5, 320, 4], dtype=f32, device=cpu) f32[5, 320, 4]
| %38 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %39 = tile(outputs=[%24, %25, %31, %32, %37, %38], inputs=[%23, %10, %20, %22, %7, %17, %21, %4, %14],
        program=#0+#0+#0) (None, (f32[5, 320, 4], f32[1, 136, 4], f32[5, 320, 4], f32[1, 136, 4], f32[5, 320, 4],
        f32[1, 136, 4]))
| %40 = getitem(%39, 1) (f32[5, 320, 4], f32[1, 136, 4], f32[5, 320, 4], f32[1, 136, 4], f32[5, 320, 4], f32[1, 136,
        4])
| %41 = getitem(%40, 0) f32[5, 320, 4]
| %42 = getitem(%40, 1) f32[1, 136, 4]
| %43 = getitem(%40, 2) f32[5, 320, 4]
| %44 = getitem(%40, 3) f32[1, 136, 4]
| %45 = getitem(%40, 4) f32[5, 320, 4]
| %46 = lora_fx.sum_parts([%41, %43, %45], [%18, %15, %12], bf16) (bf16[320, 4], bf16[320, 4], bf16[320, 4])
| %47 = getitem(%46, 0) bf16[320, 4]
| %48 = getitem(%46, 1) bf16[320, 4]
| %49 = getitem(%46, 2) bf16[320, 4]
| %50 = getitem(%40, 5) f32[1, 136, 4]
| %51 = empty([1, 4, 136], dtype=f32, device=cpu) f32[1, 4, 136]
| %52 = empty([1, 4, 136], dtype=f32, device=cpu) f32[1, 4, 136]
| %53 = empty([1, 4, 136], dtype=f32, device=cpu) f32[1, 4, 136]
| %54 = view(%21, [320, 136]) bf16[320, 136]
%55 = permute(%2, [1, 0]) bf16[136, 136]
| %56 = permute(%55, [1, 0]) bf16[136, 136]
| %57 = mm(%54, %56) bf16[320, 136]
| %58 = empty([320, 136], dtype=bf16, device=cpu) bf16[320, 136]
| %59 = tile(outputs=[%51, %52, %53, %58], inputs=[%1, %11, %0, %19, %47, %16, %48, %13, %49, %19, %47, %9, %16,
        %48, %6, %13, %49, %3], program=#1+#2) (None, (f32[1, 4, 136], f32[1, 4, 136], f32[1, 4, 136], bf16[320,
        136]))
| %60 = getitem(%59, 1) (f32[1, 4, 136], f32[1, 4, 136], f32[1, 4, 136], bf16[320, 136])
| %61 = getitem(%60, 0) f32[1, 4, 136]
| %62 = getitem(%60, 1) f32[1, 4, 136]
| %63 = getitem(%60, 2) f32[1, 4, 136]
| %64 = getitem(%60, 3) bf16[320, 136]
| %65 = auto_functionalized(lora_fx.accumulate_, base=%64, a=%28, b=%30, scale=None, beta=2.0) (None, bf16[320,
        136])
| %66 = getitem(%65, 1) bf16[320, 136]
| %67 = reshape(%66, [2, 160, 136]) bf16[2, 160, 136]
| %68 = reshape(%36, [2, 160, 136]) bf16[2, 160, 136]
| %69 = add(%67, %68) bf16[2, 160, 136]
| %70 = reshape(%57, [2, 160, 136]) bf16[2, 160, 136]
| %71 = add(%69, %70) bf16[2, 160, 136]
%72 = convert_element_type(%71, f32) f32[2, 160, 136]
%73 = convert_element_type(%0, f32) f32[136]
%74 = mul(%72, %73) f32[2, 160, 136]
%75 = mul(%27, %74) f32[2, 160, 136]
%76 = sum(%75, [2], True) f32[2, 160, 1]
%77 = div(%27, 136) f32[2, 160, 136]
%78 = mul(%77, %76) f32[2, 160, 136]
%79 = sub(%74, %78) f32[2, 160, 136]
%80 = mul(%79, %11) f32[2, 160, 136]
%81 = convert_element_type(%80, bf16) bf16[2, 160, 136]
| %82 = lora_fx.sum_parts([%42, %44, %50, %61, %62, %63], [%18, %15, %12, None, None, None], bf16) (bf16[136, 4],
        bf16[136, 4], bf16[136, 4], bf16[4, 136], bf16[4, 136], bf16[4, 136])
| %83 = getitem(%82, 0) bf16[136, 4]
| %84 = getitem(%82, 1) bf16[136, 4]
| %85 = getitem(%82, 2) bf16[136, 4]
| %86 = getitem(%82, 3) bf16[4, 136]
| %87 = getitem(%82, 4) bf16[4, 136]
| %88 = getitem(%82, 5) bf16[4, 136]
return None, %81, None, None, None, %88, %85, None, None, None, %87, %84, None, None, None, %86, %83
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
    14: op mul %13 0.5
    15: store %14 bfloat16""",
    )
