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
%9 = empty([160, 4], dtype=bf16, device=cpu) bf16[160, 4]
%10 = tile(outputs=[%9], program=#0, inputs=[%1, %4]) (None, (bf16[160, 4]))
%11 = getitem(%10, 1) (bf16[160, 4])
%12 = getitem(%11, 0) bf16[160, 4]
%13 = empty([160, 264], dtype=bf16, device=cpu) bf16[160, 264]
%14 = tile(outputs=[%13], program=#1, inputs=[%12, %5, %8]) (None, (bf16[160, 264]))
%15 = getitem(%14, 1) (bf16[160, 264])
%16 = getitem(%15, 0) bf16[160, 264]
%17 = auto_functionalized(lora_fx.accumulate_, base=%16, a=%7, b=%6, scale=None, beta=2.0) (None, bf16[160, 264])
%18 = getitem(%17, 1) bf16[160, 264]
%19 = view(%18, [2, 80, 264]) bf16[2, 80, 264]
return %19, %0, %4, %5, %7, %8, %12
#0: bfloat16, 136 columns; in0 full, in1 factor 4 RN
    0: load in0
    1: down %0 in1
#1: bfloat16, 264 columns; in0 thin 4, in1 factor 4 NR, in2 number
    0: product in0 in1 in2
    1: op mul %0 0.5
    2: store %1 bfloat16""",
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
| %7 = empty([9, 160, 4], dtype=f32, device=cpu) f32[9, 160, 4]
| %8 = empty([1, 264, 4], dtype=f32, device=cpu) f32[1, 264, 4]
| %9 = tile(outputs=[%7, %8], program=#0, inputs=[%6, %2, %5]) (None, (f32[9, 160, 4], f32[1, 264, 4]))
| %10 = getitem(%9, 1) (f32[9, 160, 4], f32[1, 264, 4])
| %11 = getitem(%10, 0) f32[9, 160, 4]
| %12 = lora_fx.sum_parts([%11], [%4], bf16) (bf16[160, 4])
| %13 = getitem(%12, 0) bf16[160, 4]
| %14 = getitem(%10, 1) f32[1, 264, 4]
| %15 = empty([1, 4, 136], dtype=f32, device=cpu) f32[1, 4, 136]
| %16 = view(%6, [160, 264]) bf16[160, 264]
%17 = permute(%0, [1, 0]) bf16[136, 264]
| %18 = permute(%17, [1, 0]) bf16[264, 136]
| %19 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
| %20 = tile(outputs=[%15, %19], inputs=[%3, %13, %13, %1], program=#1+#2) (None, (f32[1, 4, 136], bf16[160, 136]))
| %21 = getitem(%20, 1) (f32[1, 4, 136], bf16[160, 136])
| %22 = getitem(%21, 0) f32[1, 4, 136]
| %23 = getitem(%21, 1) bf16[160, 136]
| %24 = auto_functionalized(lora_fx.accumulate_, base=%23, a=%16, b=%18, scale=None, beta=2.0) (None, bf16[160,
        136])
| %25 = getitem(%24, 1) bf16[160, 136]
| %26 = view(%25, [2, 80, 136]) bf16[2, 80, 136]
| %27 = lora_fx.sum_parts([%14, %22], [%4, None], bf16) (bf16[264, 4], bf16[4, 136])
| %28 = getitem(%27, 0) bf16[264, 4]
| %29 = getitem(%27, 1) bf16[4, 136]
return None, %26, None, None, %29, %28
#0: bfloat16, 264 columns; in0 full, in1 factor 4 NR, in2 thin 4
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 136 columns; in0 full, in1 thin 4
    0: load in0
    1: across %0 in1 RN
#2: bfloat16, 136 columns; in0 thin 4, in1 factor 4 RN
    0: product in0 in1
    1: op mul %0 0.5
    2: store %1 bfloat16""",
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
%23 = empty([160, 8], dtype=bf16, device=cpu) bf16[160, 8]
%24 = tile(outputs=[%23], program=#0, inputs=[%1, %4, %9]) (None, (bf16[160, 8]))
%25 = getitem(%24, 1) (bf16[160, 8])
%26 = getitem(%25, 0) bf16[160, 8]
%27 = slice(%26, 1, 0, 4) bf16[160, 4]
%28 = permute(%6, [1, 0]) bf16[136, 264]
%29 = mm(%17, %28) bf16[160, 264]
%30 = slice(%26, 1, 4, 8) bf16[160, 4]
%31 = permute(%11, [1, 0]) bf16[264, 136]
%32 = empty([160, 264], dtype=bf16, device=cpu) bf16[160, 264]
%33 = empty([9, 160, 4], dtype=f32, device=cpu) f32[9, 160, 4]
%34 = tile(outputs=[%32, %33], program=#1, inputs=[%27, %5, %20, %18, %30, %10, %21, %29, %14]) (None, (bf16[160,
        264], f32[9, 160, 4]))
%35 = getitem(%34, 1) (bf16[160, 264], f32[9, 160, 4])
%36 = getitem(%35, 0) bf16[160, 264]
%37 = reshape(%36, [2, 80, 264]) bf16[2, 80, 264]
%38 = view(%37, [160, 264]) bf16[160, 264]
%39 = getitem(%35, 1) f32[9, 160, 4]
%40 = lora_fx.sum_parts([%39], [None], bf16) (bf16[160, 4])
%41 = getitem(%40, 0) bf16[160, 4]
%42 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
%43 = tile(outputs=[%42], program=#2, inputs=[%41, %15, %22]) (None, (bf16[160, 136]))
%44 = getitem(%43, 1) (bf16[160, 136])
%45 = getitem(%44, 0) bf16[160, 136]
%46 = auto_functionalized(lora_fx.accumulate_, base=%45, a=%38, b=%31, scale=None, beta=2.0) (None, bf16[160, 136])
%47 = getitem(%46, 1) bf16[160, 136]
%48 = view(%47, [2, 80, 136]) bf16[2, 80, 136]
return %48, %0, %4, %5, %6, %9, %10, %11, %14, %15, %17, %18, %20, %27, %29, %21, %30, %22, %41
#0: bfloat16, 136 columns; in0 full, in1 factor 4 RN, in2 factor 4 RN
    0: load in0
    1: down %0 in1|in2
#1: bfloat16, 264 columns; in0 thin 4, in1 factor 4 NR, in2 number, in3 full, in4 thin 4, in5 factor 4 NR, in6
        number, in7 full, in8 factor 4 RN
    0: product in0 in1 in2
    1: load in3
    2: op add %1 %0
    3: op sigmoid %2
    4: op mul %2 %3
    5: product in4 in5 in6
    6: load in7
    7: op add %6 %5
    8: op mul %4 %7
    9: store %8 bfloat16
    10: down %8 in8
#2: bfloat16, 136 columns; in0 thin 4, in1 factor 4 NR, in2 number
    0: product in0 in1 in2
    1: op mul %0 0.5
    2: store %1 bfloat16""",
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
| %19 = empty([5, 160, 4], dtype=f32, device=cpu) f32[5, 160, 4]
| %20 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %21 = tile(outputs=[%19, %20], program=#0, inputs=[%18, %8, %17]) (None, (f32[5, 160, 4], f32[1, 136, 4]))
| %22 = getitem(%21, 1) (f32[5, 160, 4], f32[1, 136, 4])
| %23 = getitem(%22, 0) f32[5, 160, 4]
| %24 = lora_fx.sum_parts([%23], [%16], bf16) (bf16[160, 4])
| %25 = getitem(%24, 0) bf16[160, 4]
| %26 = getitem(%22, 1) f32[1, 136, 4]
| %27 = view(%18, [160, 136]) bf16[160, 136]
%28 = permute(%6, [1, 0]) bf16[264, 136]
| %29 = permute(%28, [1, 0]) bf16[136, 264]
| %30 = mm(%27, %29) bf16[160, 264]
%31 = permute(%3, [1, 0]) bf16[136, 264]
| %32 = permute(%31, [1, 0]) bf16[264, 136]
| %33 = empty([1, 4, 264], dtype=f32, device=cpu) f32[1, 4, 264]
| %34 = lora_fx.donated(%10, [160, 264]) bf16[160, 264]
| %35 = tile(outputs=[%33, %30, %34], program=#1, inputs=[%12, %2, %11, %10, %15, %5, %14, %13, %25, %7, %30])
        (None, (f32[1, 4, 264], bf16[160, 264], bf16[160, 264]))
| %36 = getitem(%35, 1) (f32[1, 4, 264], bf16[160, 264], bf16[160, 264])
| %37 = getitem(%36, 0) f32[1, 4, 264]
| %38 = getitem(%36, 1) bf16[160, 264]
| %39 = reshape(%38, [2, 80, 264]) bf16[2, 80, 264]
| %40 = empty([9, 160, 4], dtype=f32, device=cpu) f32[9, 160, 4]
| %41 = empty([1, 264, 4], dtype=f32, device=cpu) f32[1, 264, 4]
| %42 = view(%39, [160, 264]) bf16[160, 264]
| %43 = getitem(%36, 2) bf16[160, 264]
| %44 = reshape(%43, [2, 80, 264]) bf16[2, 80, 264]
| %45 = empty([9, 160, 4], dtype=f32, device=cpu) f32[9, 160, 4]
| %46 = empty([1, 264, 4], dtype=f32, device=cpu) f32[1, 264, 4]
| %47 = tile(outputs=[%40, %41, %45, %46], inputs=[%38, %5, %15, %43, %2, %12], program=#2+#2) (None, (f32[9, 160,
        4], f32[1, 264, 4], f32[9, 160, 4], f32[1, 264, 4]))
| %48 = getitem(%47, 1) (f32[9, 160, 4], f32[1, 264, 4], f32[9, 160, 4], f32[1, 264, 4])
| %49 = getitem(%48, 0) f32[9, 160, 4]
| %50 = getitem(%48, 1) f32[1, 264, 4]
| %51 = getitem(%48, 2) f32[9, 160, 4]
| %52 = getitem(%48, 3) f32[1, 264, 4]
| %53 = lora_fx.sum_parts([%51, %49], [%11, %14], bf16, True) (bf16[160, 8])
| %54 = getitem(%53, 0) bf16[160, 8]
| %55 = empty([1, 8, 136], dtype=f32, device=cpu) f32[1, 8, 136]
| %56 = view(%44, [160, 264]) bf16[160, 264]
%57 = permute(%0, [1, 0]) bf16[136, 264]
| %58 = permute(%57, [1, 0]) bf16[264, 136]
| %59 = mm(%56, %58) bf16[160, 136]
| %60 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
| %61 = tile(outputs=[%55, %60], inputs=[%9, %54, %54, %1, %4], program=#3+#4) (None, (f32[1, 8, 136], bf16[160,
        136]))
| %62 = getitem(%61, 1) (f32[1, 8, 136], bf16[160, 136])
| %63 = getitem(%62, 0) f32[1, 8, 136]
| %64 = getitem(%62, 1) bf16[160, 136]
| %65 = auto_functionalized(lora_fx.accumulate_, base=%64, a=%42, b=%32, scale=None, beta=2.0) (None, bf16[160,
        136])
| %66 = getitem(%65, 1) bf16[160, 136]
| %67 = reshape(%66, [2, 80, 136]) bf16[2, 80, 136]
| %68 = reshape(%59, [2, 80, 136]) bf16[2, 80, 136]
| %69 = add(%67, %68) bf16[2, 80, 136]
| %70 = lora_fx.sum_parts([%26, %37, %50, %52, %63], [%16, None, %14, %11, None], bf16) (bf16[136, 4], bf16[4, 264],
        bf16[264, 4], bf16[264, 4], bf16[8, 136])
| %71 = getitem(%70, 0) bf16[136, 4]
| %72 = getitem(%70, 1) bf16[4, 264]
| %73 = getitem(%70, 2) bf16[264, 4]
| %74 = getitem(%70, 3) bf16[264, 4]
| %75 = getitem(%70, 4) bf16[8, 136]
| %76 = slice(%75, 0, 4, 8) bf16[4, 136]
| %77 = slice(%75, 0, 0, 4) bf16[4, 136]
return None, %69, None, None, %77, %74, None, None, None, %76, %73, None, None, None, %72, %71
#0: bfloat16, 136 columns; in0 full, in1 factor 4 NR, in2 thin 4
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 264 columns; in0 thin 4, in1 factor 4 NR, in2 number, in3 full, in4 thin 4, in5 factor 4 NR, in6
        number, in7 full, in8 thin 4, in9 factor 4 RN, in10 full
    0: product in0 in1 in2
    1: load in3
    2: op add %1 %0
    3: op sigmoid %2
    4: op mul %2 %3
    5: product in4 in5 in6
    6: load in7
    7: op add %6 %5
    8: op mul %4 %7
    9: across %8 in8 RN
    10: product in8 in9
    11: load in10
    12: op add %10 %11
    13: op mul %12 %4
    14: store %13 bfloat16
    15: op mul %12 %7
    16: op mul %15 %3
    17: op sub 1.0 %3
    18: op mul %2 %17
    19: op add %18 1.0
    20: op mul %16 %19
    21: store %20 bfloat16
#2: bfloat16, 264 columns; in0 full, in1 factor 4 NR, in2 thin 4
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#3: bfloat16, 136 columns; in0 full, in1 thin 8
    0: load in0
    1: across %0 in1 RN
#4: bfloat16, 136 columns; in0 thin 8, in1 factor 4 RN, in2 factor 4 RN
    0: product in0 in1|in2
    1: op mul %0 0.5
    2: store %1 bfloat16""",
    )
