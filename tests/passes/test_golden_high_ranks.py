"""The graphs of a SwiGLU of rank 40, and of q, k and v of rank 24 each, after their regions have been cut out.

See `tests/passes/test_golden_tiles.py`. M = 272 tokens.
"""

from expecttest import assert_expected_inline

from tests.passes.on_gpu import capture, halves
from tests.passes.test_high_ranks import lower, mlp, qkv, x


def test_a_pair_is_split() -> None:
    """dB of gate and up are sums of the kernel that makes dgate and dup; g are products of their own."""
    _, backward = halves(capture(mlp(rank=40), x(80), step=lower))
    assert_expected_inline(
        backward,
        """\
%0 = input bf16[160, 80]
%1 = input bf16[272, 80]
%2 = input bf16[40, 80]
%3 = input bf16[160, 40]
%4 = input bf16[160, 80]
%5 = input bf16[40, 80]
%6 = input bf16[160, 40]
%7 = input bf16[80, 160]
%8 = input bf16[40, 160]
%9 = input bf16[80, 40]
%10 = input bf16[272, 160]
%11 = input f32[]
%12 = input bf16[272, 40]
%13 = input bf16[272, 160]
%14 = input f32[]
%15 = input bf16[272, 40]
%16 = input f32[]
%17 = input bf16[272, 40]
| %18 = tangent bf16[272, 80]
| %19 = empty([3, 272, 40], dtype=f32, device=cpu) f32[3, 272, 40]
| %20 = empty([1, 80, 40], dtype=f32, device=cpu) f32[1, 80, 40]
| %21 = tile(outputs=[%19, %20], program=#0, inputs=[%18, %9, %17]) (None, (f32[3, 272, 40], f32[1, 80, 40]))
| %22 = getitem(%21, 1) (f32[3, 272, 40], f32[1, 80, 40])
| %23 = getitem(%22, 0) f32[3, 272, 40]
| %24 = lora_fx.sum_parts([%23], [%16], bf16) (bf16[272, 40])
| %25 = getitem(%24, 0) bf16[272, 40]
| %26 = getitem(%22, 1) f32[1, 80, 40]
%27 = permute(%3, [1, 0]) bf16[40, 160]
%28 = permute(%6, [1, 0]) bf16[40, 160]
%29 = permute(%7, [1, 0]) bf16[160, 80]
| %30 = permute(%29, [1, 0]) bf16[80, 160]
| %31 = mm(%18, %30) bf16[272, 160]
| %32 = permute(%28, [1, 0]) bf16[160, 40]
%33 = permute(%4, [1, 0]) bf16[80, 160]
| %34 = permute(%33, [1, 0]) bf16[160, 80]
| %35 = permute(%27, [1, 0]) bf16[160, 40]
| %36 = empty([1, 40, 160], dtype=f32, device=cpu) f32[1, 40, 160]
| %37 = empty([1, 160, 40], dtype=f32, device=cpu) f32[1, 160, 40]
| %38 = lora_fx.donated(%10, [272, 160]) bf16[272, 160]
| %39 = empty([1, 160, 40], dtype=f32, device=cpu) f32[1, 160, 40]
| %40 = tile(outputs=[%36, %31, %37, %38, %39], program=#1, inputs=[%12, %3, %11, %10, %15, %6, %14, %13, %25, %8,
        %31]) (None, (f32[1, 40, 160], bf16[272, 160], f32[1, 160, 40], bf16[272, 160], f32[1, 160, 40]))
| %41 = getitem(%40, 1) (f32[1, 40, 160], bf16[272, 160], f32[1, 160, 40], bf16[272, 160], f32[1, 160, 40])
| %42 = getitem(%41, 0) f32[1, 40, 160]
| %43 = getitem(%41, 1) bf16[272, 160]
| %44 = mm(%43, %32) bf16[272, 40]
| %45 = mul(%44, %14) bf16[272, 40]
| %46 = mm(%43, %34) bf16[272, 80]
| %47 = getitem(%41, 2) f32[1, 160, 40]
| %48 = getitem(%41, 3) bf16[272, 160]
| %49 = mm(%48, %35) bf16[272, 40]
| %50 = mul(%49, %11) bf16[272, 40]
| %51 = getitem(%41, 4) f32[1, 160, 40]
| %52 = cat([%50, %45], 1) bf16[272, 80]
| %53 = permute(%52, [1, 0]) bf16[80, 272]
| %54 = mm(%53, %1) bf16[80, 80]
| %55 = slice(%54, 0, 40, 80) bf16[40, 80]
| %56 = slice(%54, 0, 0, 40) bf16[40, 80]
%57 = cat([%2, %5], 0) bf16[80, 80]
| %58 = mm(%52, %57) bf16[272, 80]
| %59 = add(%46, %58) bf16[272, 80]
%60 = permute(%0, [1, 0]) bf16[80, 160]
| %61 = permute(%60, [1, 0]) bf16[160, 80]
| %62 = mm(%48, %61) bf16[272, 80]
| %63 = add(%59, %62) bf16[272, 80]
| %64 = lora_fx.sum_parts([%26, %42, %47, %51], [%16, None, %14, %11], bf16) (bf16[80, 40], bf16[40, 160], bf16[160,
        40], bf16[160, 40])
| %65 = getitem(%64, 0) bf16[80, 40]
| %66 = getitem(%64, 1) bf16[40, 160]
| %67 = getitem(%64, 2) bf16[160, 40]
| %68 = getitem(%64, 3) bf16[160, 40]
return None, %63, None, None, %56, %68, None, None, None, %55, %67, None, None, None, %66, %65
#0: bfloat16, 80 columns; in0 full, in1 factor 40 NR, in2 thin 40
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 160 columns; in0 thin 40, in1 factor 40 NR, in2 number, in3 full, in4 thin 40, in5 factor 40 NR, in6
        number, in7 full, in8 thin 40, in9 factor 40 RN, in10 full
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
    16: across %13 in4 NR
    17: op mul %15 %3
    18: op sub 1.0 %3
    19: op mul %2 %18
    20: op add %19 1.0
    21: op mul %17 %20
    22: store %21 bfloat16
    23: across %21 in0 NR""",
    )


def test_a_stack_accumulates() -> None:
    """q, k and v have rank 72 together: h and dA are the library's, and dX is made by four products of it."""
    forward, backward = halves(capture(qkv(rank=24), x(144), step=lower))
    assert_expected_inline(
        forward,
        """\
%0 = input bf16[144, 144]
%1 = input bf16[272, 144]
%2 = input f32[]
%3 = input f32[]
%4 = input bf16[24, 144]
%5 = input bf16[144, 24]
%6 = input bf16[48, 144]
%7 = input f32[]
%8 = input f32[]
%9 = input bf16[24, 144]
%10 = input bf16[48, 24]
%11 = input bf16[48, 144]
%12 = input f32[]
%13 = input f32[]
%14 = input bf16[24, 144]
%15 = input bf16[48, 24]
%16 = permute(%0, [1, 0]) bf16[144, 144]
%17 = _foreach_mul([%2, %7, %12], [%3, %8, %13]) (f32[], f32[], f32[])
%18 = getitem(%17, 0) f32[]
%19 = getitem(%17, 1) f32[]
%20 = getitem(%17, 2) f32[]
%21 = cat([%4, %9, %14], 0) bf16[72, 144]
%22 = permute(%21, [1, 0]) bf16[144, 72]
%23 = mm(%1, %22) bf16[272, 72]
%24 = slice(%23, 1, 0, 24) bf16[272, 24]
%25 = empty([272, 144], dtype=bf16, device=cpu) bf16[272, 144]
%26 = permute(%6, [1, 0]) bf16[144, 48]
%27 = slice(%23, 1, 24, 48) bf16[272, 24]
%28 = empty([272, 48], dtype=bf16, device=cpu) bf16[272, 48]
%29 = permute(%11, [1, 0]) bf16[144, 48]
%30 = slice(%23, 1, 48, 72) bf16[272, 24]
%31 = empty([272, 48], dtype=bf16, device=cpu) bf16[272, 48]
%32 = tile(outputs=[%25, %28, %31], inputs=[%24, %5, %18, %27, %10, %19, %30, %15, %20], program=#0+#1+#1) (None,
        (bf16[272, 144], bf16[272, 48], bf16[272, 48]))
%33 = getitem(%32, 1) (bf16[272, 144], bf16[272, 48], bf16[272, 48])
%34 = getitem(%33, 0) bf16[272, 144]
%35 = auto_functionalized(lora_fx.accumulate_, base=%34, a=%1, b=%16, scale=None, beta=2.0) (None, bf16[272, 144])
%36 = getitem(%35, 1) bf16[272, 144]
%37 = getitem(%33, 1) bf16[272, 48]
%38 = auto_functionalized(lora_fx.accumulate_, base=%37, a=%1, b=%26, scale=None, beta=2.0) (None, bf16[272, 48])
%39 = getitem(%38, 1) bf16[272, 48]
%40 = getitem(%33, 2) bf16[272, 48]
%41 = auto_functionalized(lora_fx.accumulate_, base=%40, a=%1, b=%29, scale=None, beta=2.0) (None, bf16[272, 48])
%42 = getitem(%41, 1) bf16[272, 48]
return %36, %39, %42, %0, %1, %4, %5, %6, %9, %10, %11, %14, %15, %18, %24, %19, %27, %20, %30
#0: bfloat16, 144 columns; in0 thin 24, in1 factor 24 NR, in2 number
    0: product in0 in1 in2
    1: op mul %0 0.5
    2: store %1 bfloat16
#1: bfloat16, 48 columns; in0 thin 24, in1 factor 24 NR, in2 number
    0: product in0 in1 in2
    1: op mul %0 0.5
    2: store %1 bfloat16""",
    )
    assert_expected_inline(
        backward,
        """\
%0 = input bf16[144, 144]
%1 = input bf16[272, 144]
%2 = input bf16[24, 144]
%3 = input bf16[144, 24]
%4 = input bf16[48, 144]
%5 = input bf16[24, 144]
%6 = input bf16[48, 24]
%7 = input bf16[48, 144]
%8 = input bf16[24, 144]
%9 = input bf16[48, 24]
%10 = input f32[]
%11 = input bf16[272, 24]
%12 = input f32[]
%13 = input bf16[272, 24]
%14 = input f32[]
%15 = input bf16[272, 24]
| %16 = tangent bf16[272, 144]
| %17 = tangent bf16[272, 48]
| %18 = tangent bf16[272, 48]
| %19 = empty([2, 272, 24], dtype=f32, device=cpu) f32[2, 272, 24]
| %20 = empty([1, 48, 24], dtype=f32, device=cpu) f32[1, 48, 24]
%21 = permute(%7, [1, 0]) bf16[144, 48]
| %22 = permute(%21, [1, 0]) bf16[48, 144]
| %23 = empty([2, 272, 24], dtype=f32, device=cpu) f32[2, 272, 24]
| %24 = empty([1, 48, 24], dtype=f32, device=cpu) f32[1, 48, 24]
%25 = permute(%4, [1, 0]) bf16[144, 48]
| %26 = permute(%25, [1, 0]) bf16[48, 144]
| %27 = empty([5, 272, 24], dtype=f32, device=cpu) f32[5, 272, 24]
| %28 = empty([1, 144, 24], dtype=f32, device=cpu) f32[1, 144, 24]
| %29 = tile(outputs=[%19, %20, %23, %24, %27, %28], inputs=[%18, %9, %15, %17, %6, %13, %16, %3, %11],
        program=#0+#0+#1) (None, (f32[2, 272, 24], f32[1, 48, 24], f32[2, 272, 24], f32[1, 48, 24], f32[5, 272, 24],
        f32[1, 144, 24]))
| %30 = getitem(%29, 1) (f32[2, 272, 24], f32[1, 48, 24], f32[2, 272, 24], f32[1, 48, 24], f32[5, 272, 24], f32[1,
        144, 24])
| %31 = getitem(%30, 0) f32[2, 272, 24]
| %32 = getitem(%30, 1) f32[1, 48, 24]
| %33 = getitem(%30, 2) f32[2, 272, 24]
| %34 = getitem(%30, 3) f32[1, 48, 24]
| %35 = getitem(%30, 4) f32[5, 272, 24]
| %36 = getitem(%30, 5) f32[1, 144, 24]
| %37 = lora_fx.sum_parts([%35, %33, %31], [%10, %12, %14], bf16, True) (bf16[272, 72])
| %38 = getitem(%37, 0) bf16[272, 72]
| %39 = permute(%38, [1, 0]) bf16[72, 272]
| %40 = mm(%39, %1) bf16[72, 144]
| %41 = slice(%40, 0, 48, 72) bf16[24, 144]
| %42 = slice(%40, 0, 24, 48) bf16[24, 144]
| %43 = slice(%40, 0, 0, 24) bf16[24, 144]
%44 = cat([%2, %5, %8], 0) bf16[72, 144]
%45 = empty([272, 144], dtype=bf16, device=cpu) bf16[272, 144]
| %46 = auto_functionalized(lora_fx.accumulate_, base=%45, a=%38, b=%44, scale=None, beta=0.0, alpha=0.125) (None,
        bf16[272, 144])
| %47 = getitem(%46, 1) bf16[272, 144]
%48 = permute(%0, [1, 0]) bf16[144, 144]
| %49 = permute(%48, [1, 0]) bf16[144, 144]
| %50 = auto_functionalized(lora_fx.accumulate_, base=%47, a=%16, b=%49, scale=None, beta=2.0, alpha=0.25) (None,
        bf16[272, 144])
| %51 = getitem(%50, 1) bf16[272, 144]
| %52 = auto_functionalized(lora_fx.accumulate_, base=%51, a=%17, b=%26, scale=None, beta=2.0, alpha=0.5) (None,
        bf16[272, 144])
| %53 = getitem(%52, 1) bf16[272, 144]
| %54 = auto_functionalized(lora_fx.accumulate_, base=%53, a=%18, b=%22, scale=None, beta=2.0, alpha=1.0) (None,
        bf16[272, 144])
| %55 = getitem(%54, 1) bf16[272, 144]
| %56 = lora_fx.sum_parts([%32, %34, %36], [%14, %12, %10], bf16) (bf16[48, 24], bf16[48, 24], bf16[144, 24])
| %57 = getitem(%56, 0) bf16[48, 24]
| %58 = getitem(%56, 1) bf16[48, 24]
| %59 = getitem(%56, 2) bf16[144, 24]
return None, %55, None, None, %43, %59, None, None, None, %42, %58, None, None, None, %41, %57
#0: bfloat16, 48 columns; in0 full, in1 factor 24 NR, in2 thin 24
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 144 columns; in0 full, in1 factor 24 NR, in2 thin 24
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR""",
    )
