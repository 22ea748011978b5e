"""The graphs that the passes make of one linear, to read. EXPECTTEST_ACCEPT=1 writes them anew; read what changed.

`|` marks the backward half. The text is the same on every torch that is supported.
"""

import expecttest
import torch
from torch import nn

from tests.passes.harness import adapt, capture


def x(requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(2, 3, 8, requires_grad=requires_grad)


def linear() -> nn.Module:
    return adapt(nn.Linear(8, 6), rank=2)


class TestLinear(expecttest.TestCase):
    def test_before(self) -> None:
        self.assertExpectedInline(
            capture(linear(), x()).rewrite.before,
            """\
%0 = input                    f32[6, 8]
%1 = input                    f32[6]
%2 = input                    f32[2, 3, 8]
%3 = input                    f32[]
%4 = input                    f32[]
%5 = input                    f32[2, 8]
%6 = input                    f32[6, 2]
| %7 = tangent                f32[2, 3, 6]
%8 = view(%2, [6, 8])         f32[6, 8]
%9 = permute(%0, [1, 0])      f32[8, 6]
%10 = addmm(%1, %8, %9)       f32[6, 6]
%11 = view(%10, [2, 3, 6])    f32[2, 3, 6]
%12 = mul(%3, %4)             f32[]
%13 = permute(%5, [1, 0])     f32[8, 2]
%14 = view(%2, [6, 8])        f32[6, 8]
%15 = mm(%14, %13)            f32[6, 2]
%16 = view(%15, [2, 3, 2])    f32[2, 3, 2]
%17 = permute(%6, [1, 0])     f32[2, 6]
%18 = view(%16, [6, 2])       f32[6, 2]
%19 = mm(%18, %17)            f32[6, 6]
%20 = view(%19, [2, 3, 6])    f32[2, 3, 6]
%21 = mul(%20, %12)           f32[2, 3, 6]
%22 = add(%11, %21)           f32[2, 3, 6]
| %23 = mul(%7, %12)          f32[2, 3, 6]
| %24 = view(%23, [6, 6])     f32[6, 6]
| %25 = permute(%24, [1, 0])  f32[6, 6]
| %26 = mm(%25, %18)          f32[6, 2]
| %27 = permute(%26, [1, 0])  f32[2, 6]
| %28 = permute(%17, [1, 0])  f32[6, 2]
| %29 = mm(%24, %28)          f32[6, 2]
| %30 = view(%29, [2, 3, 2])  f32[2, 3, 2]
| %31 = permute(%27, [1, 0])  f32[6, 2]
| %32 = view(%30, [6, 2])     f32[6, 2]
| %33 = permute(%32, [1, 0])  f32[2, 6]
| %34 = mm(%33, %14)          f32[2, 8]
| %35 = permute(%34, [1, 0])  f32[8, 2]
| %36 = permute(%13, [1, 0])  f32[2, 8]
| %37 = mm(%32, %36)          f32[6, 8]
| %38 = view(%37, [2, 3, 8])  f32[2, 3, 8]
| %39 = permute(%35, [1, 0])  f32[2, 8]
| %40 = view(%7, [6, 6])      f32[6, 6]
| %41 = permute(%9, [1, 0])   f32[6, 8]
| %42 = mm(%40, %41)          f32[6, 8]
| %43 = view(%42, [2, 3, 8])  f32[2, 3, 8]
| %44 = add(%38, %43)         f32[2, 3, 8]
return %22, None, None, %44, None, None, %39, %31""",
        )

    def test_after(self) -> None:
        self.assertExpectedInline(
            capture(linear(), x()).rewrite.after,
            """\
%0 = input                                         f32[6, 8]
%1 = input                                         f32[6]
%2 = input                                         f32[2, 3, 8]
%3 = input                                         f32[]
%4 = input                                         f32[]
%5 = input                                         f32[2, 8]
%6 = input                                         f32[6, 2]
| %7 = tangent                                     f32[2, 3, 6]
%8 = view(%2, [6, 8])                              f32[6, 8]
%9 = permute(%0, [1, 0])                           f32[8, 6]
%10 = addmm(%1, %8, %9)                            f32[6, 6]
%11 = mul(%3, %4)                                  f32[]
%12 = permute(%5, [1, 0])                          f32[8, 2]
%13 = view(%2, [6, 8])                             f32[6, 8]
%14 = mm(%13, %12)                                 f32[6, 2]
%15 = view(%14, [2, 3, 2])                         f32[2, 3, 2]
%16 = permute(%6, [1, 0])                          f32[2, 6]
%17 = view(%15, [6, 2])                            f32[6, 2]
%18 = lora_fx.accumulate(%10, %17, %16, %11)       f32[6, 6]
%19 = view(%18, [2, 3, 6])                         f32[2, 3, 6]
| %20 = permute(%16, [1, 0])                       f32[6, 2]
| %21 = view(%7, [-1, 6])                          f32[6, 6]
| %22 = lora_fx.gradient_pair(%21, %20, %17, %11)  (f32[6, 2], f32[6, 2])
| %23 = getitem(%22, 1)                            f32[6, 2]
| %24 = permute(%23, [1, 0])                       f32[2, 6]
| %25 = getitem(%22, 0)                            f32[6, 2]
| %26 = view(%25, [2, 3, 2])                       f32[2, 3, 2]
| %27 = permute(%24, [1, 0])                       f32[6, 2]
| %28 = view(%26, [6, 2])                          f32[6, 2]
| %29 = permute(%28, [1, 0])                       f32[2, 6]
| %30 = mm(%29, %13)                               f32[2, 8]
| %31 = permute(%30, [1, 0])                       f32[8, 2]
| %32 = permute(%12, [1, 0])                       f32[2, 8]
| %33 = permute(%31, [1, 0])                       f32[2, 8]
| %34 = view(%7, [6, 6])                           f32[6, 6]
| %35 = permute(%9, [1, 0])                        f32[6, 8]
| %36 = mm(%34, %35)                               f32[6, 8]
| %37 = lora_fx.accumulate(%36, %28, %32)          f32[6, 8]
| %38 = view(%37, [2, 3, 8])                       f32[2, 3, 8]
return %19, None, None, %38, None, None, %33, %27""",
        )

    def test_first_layer(self) -> None:
        self.assertExpectedInline(
            capture(linear(), x(False)).rewrite.after,
            """\
%0 = input                                         f32[6, 8]
%1 = input                                         f32[6]
%2 = input                                         f32[2, 3, 8]
%3 = input                                         f32[]
%4 = input                                         f32[]
%5 = input                                         f32[2, 8]
%6 = input                                         f32[6, 2]
| %7 = tangent                                     f32[2, 3, 6]
%8 = view(%2, [6, 8])                              f32[6, 8]
%9 = permute(%0, [1, 0])                           f32[8, 6]
%10 = addmm(%1, %8, %9)                            f32[6, 6]
%11 = mul(%3, %4)                                  f32[]
%12 = permute(%5, [1, 0])                          f32[8, 2]
%13 = view(%2, [6, 8])                             f32[6, 8]
%14 = mm(%13, %12)                                 f32[6, 2]
%15 = view(%14, [2, 3, 2])                         f32[2, 3, 2]
%16 = permute(%6, [1, 0])                          f32[2, 6]
%17 = view(%15, [6, 2])                            f32[6, 2]
%18 = lora_fx.accumulate(%10, %17, %16, %11)       f32[6, 6]
%19 = view(%18, [2, 3, 6])                         f32[2, 3, 6]
| %20 = permute(%16, [1, 0])                       f32[6, 2]
| %21 = view(%7, [-1, 6])                          f32[6, 6]
| %22 = lora_fx.gradient_pair(%21, %20, %17, %11)  (f32[6, 2], f32[6, 2])
| %23 = getitem(%22, 1)                            f32[6, 2]
| %24 = permute(%23, [1, 0])                       f32[2, 6]
| %25 = getitem(%22, 0)                            f32[6, 2]
| %26 = view(%25, [2, 3, 2])                       f32[2, 3, 2]
| %27 = permute(%24, [1, 0])                       f32[6, 2]
| %28 = view(%26, [6, 2])                          f32[6, 2]
| %29 = permute(%28, [1, 0])                       f32[2, 6]
| %30 = mm(%29, %13)                               f32[2, 8]
| %31 = permute(%30, [1, 0])                       f32[8, 2]
| %32 = permute(%31, [1, 0])                       f32[2, 8]
return %19, None, None, None, None, None, %32, %27""",
        )

    def test_inference(self) -> None:
        with torch.no_grad():
            self.assertExpectedInline(
                capture(linear(), x()).rewrite.after,
                """\
%0 = input                                   f32[6, 8]
%1 = input                                   f32[6]
%2 = input                                   f32[2, 3, 8]
%3 = input                                   f32[]
%4 = input                                   f32[]
%5 = input                                   f32[2, 8]
%6 = input                                   f32[6, 2]
%7 = view(%2, [6, 8])                        f32[6, 8]
%8 = permute(%0, [1, 0])                     f32[8, 6]
%9 = addmm(%1, %7, %8)                       f32[6, 6]
%10 = mul(%3, %4)                            f32[]
%11 = permute(%5, [1, 0])                    f32[8, 2]
%12 = view(%2, [6, 8])                       f32[6, 8]
%13 = mm(%12, %11)                           f32[6, 2]
%14 = view(%13, [2, 3, 2])                   f32[2, 3, 2]
%15 = permute(%6, [1, 0])                    f32[2, 6]
%16 = view(%14, [6, 2])                      f32[6, 2]
%17 = lora_fx.accumulate(%9, %16, %15, %10)  f32[6, 6]
%18 = view(%17, [2, 3, 6])                   f32[2, 3, 6]
return %18""",
            )

    def test_dynamic(self) -> None:
        self.assertExpectedInline(
            capture(linear(), x(), dynamic=True).rewrite.after,
            """\
%0 = input                                         f32[6, 8]
%1 = input                                         f32[6]
%2 = input                                         [s0]
%3 = input                                         [s1]
%4 = input                                         f32[s0, s1, 8]
%5 = input                                         f32[]
%6 = input                                         f32[]
%7 = input                                         f32[2, 8]
%8 = input                                         f32[6, 2]
| %9 = tangent                                     f32[s0, s1, 6]
%10 = mul(%2, %3)                                  [s0*s1]
%11 = view(%4, [%10, 8])                           f32[s0*s1, 8]
%12 = permute(%0, [1, 0])                          f32[8, 6]
%13 = addmm(%1, %11, %12)                          f32[s0*s1, 6]
%14 = mul(%5, %6)                                  f32[]
%15 = permute(%7, [1, 0])                          f32[8, 2]
%16 = view(%4, [%10, 8])                           f32[s0*s1, 8]
%17 = mm(%16, %15)                                 f32[s0*s1, 2]
%18 = view(%17, [%2, %3, 2])                       f32[s0, s1, 2]
%19 = permute(%8, [1, 0])                          f32[2, 6]
%20 = view(%18, [%10, 2])                          f32[s0*s1, 2]
%21 = lora_fx.accumulate(%13, %20, %19, %14)       f32[s0*s1, 6]
%22 = view(%21, [%2, %3, 6])                       f32[s0, s1, 6]
| %23 = permute(%19, [1, 0])                       f32[6, 2]
| %24 = view(%9, [-1, 6])                          f32[s0*s1, 6]
| %25 = lora_fx.gradient_pair(%24, %23, %20, %14)  (f32[s0*s1, 2], f32[6, 2])
| %26 = getitem(%25, 1)                            f32[6, 2]
| %27 = permute(%26, [1, 0])                       f32[2, 6]
| %28 = getitem(%25, 0)                            f32[s0*s1, 2]
| %29 = view(%28, [%2, %3, 2])                     f32[s0, s1, 2]
| %30 = permute(%27, [1, 0])                       f32[6, 2]
| %31 = view(%29, [%10, 2])                        f32[s0*s1, 2]
| %32 = permute(%31, [1, 0])                       f32[2, s0*s1]
| %33 = mm(%32, %16)                               f32[2, 8]
| %34 = permute(%33, [1, 0])                       f32[8, 2]
| %35 = permute(%15, [1, 0])                       f32[2, 8]
| %36 = permute(%34, [1, 0])                       f32[2, 8]
| %37 = view(%9, [%10, 6])                         f32[s0*s1, 6]
| %38 = permute(%12, [1, 0])                       f32[6, 8]
| %39 = mm(%37, %38)                               f32[s0*s1, 8]
| %40 = lora_fx.accumulate(%39, %31, %35)          f32[s0*s1, 8]
| %41 = view(%40, [%2, %3, 8])                     f32[s0, s1, 8]
return %22, None, None, None, None, %41, None, None, %36, %30""",
        )
