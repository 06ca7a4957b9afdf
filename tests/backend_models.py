"""Models for the backend of torch.compile, and the comparison of one with itself in that way."""

import copy

import torch
from common import generator
from torch import nn

import fusednorm
from fusednorm.convert import Report


def values(*shape, dtype=torch.float64):
    return torch.randn(shape or (4, 6, 5, 5), generator=generator(1), dtype=dtype)


class Case(nn.Module):
    """A function of some layers and an input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        self.bn = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def compiled(model, report=None, fullgraph=False, **options):
    torch._dynamo.reset()
    options = {"small": "always"} | options | ({} if report is None else {"report": report.add})
    return torch.compile(model, backend=fusednorm.backend, fullgraph=fullgraph, options=options)


def step(run, model, x):
    x = x.clone().requires_grad_()
    output = run(x)
    (output.square().sum() + output.sum()).backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def same(model, x=None, steps=2, **options):
    """Trains stock and compiled, evaluates both, and asks for equality; the report of the first graph."""
    x = values() if x is None else x
    stock = model.double()
    ours = copy.deepcopy(stock)
    report = Report()
    run = compiled(ours, report, **options)
    for _ in range(steps):
        for a, b in zip(step(stock, stock, x), step(run, ours, x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    rows = list(report.rows)
    stock.eval(), ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(x), stock(x), rtol=1e-9, atol=1e-9)
    return rows


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, **options)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)) + x)
