"""The products of siblings, one by one and as one, as far as a CPU can tell."""

import torch
from benchmarks import products
from benchmarks.timing import Device


def test_as_one_they_give_what_they_give_one_by_one():
    torch.manual_seed(0)
    forward, backward = products.forms(products.Siblings("toy", 24, 64, (32, 16), 8), Device("cpu"))
    apart = backward["apart"]().clone()
    torch.testing.assert_close(backward["one, g copied"](), apart, rtol=0.02, atol=0.2)
    assert torch.equal(backward["one"](), backward["one, g copied"]()), "g is there by now"
    h, *ys = forward["apart"]()
    whole = torch.cat([part for y, its in zip(ys, h.split(8, 1), strict=True) for part in (y, its)], 1)
    torch.testing.assert_close(forward["one"](), whole, rtol=0.02, atol=0.2)
    torch.testing.assert_close(torch.cat(forward["each"](), 1), whole, rtol=0.02, atol=0.2)


def test_it_runs(capsys):
    products.main(["--smoke", "--device", "cpu", "--rounds", "2", "--window", "0.001"])
    header, _, row = capsys.readouterr().out.strip().splitlines()[-3:]
    assert header.startswith("siblings") and row.split()[0] == "toy" and len(row.split()) == 12
