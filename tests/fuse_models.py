"""Small models, each with something that a careless converter would break."""

import random

import torch
import torch.nn.functional as F
from common import generator
from torch import nn
from torch.utils.checkpoint import checkpoint


def picture(*shape):
    return torch.randn(shape or (4, 3, 8, 8), generator=generator(1), dtype=torch.float64)


class ConvNormAct(nn.Module):
    def __init__(self, act=None, inside=3, outside=6):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3)
        self.bn = nn.BatchNorm2d(outside)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class SharedAct(nn.Module):
    """One activation object, a slot of it in each block."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU(inplace=True)
        self.one, self.two = ConvNormAct(act), ConvNormAct(act, 6)

    def forward(self, x):
        return self.two(self.one(x))


class ActTwice(nn.Module):
    """torchvision's BasicBlock: the second call of the ReLU does not follow a norm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class UsedTwice(nn.Module):
    """What the norm gives goes to the activation and past it."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return self.act(y) + y


class UsedAfterIdleDropout(nn.Module):
    """In evaluation the dropout gives the tensor that it took, and the addition takes both."""

    def __init__(self):
        super().__init__()
        self.bn, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, x):
        y = self.bn(x)
        return self.drop(y) + y


class InPlaceIgnored(nn.Module):
    """The activation writes, and nobody takes what it returns."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn(x)
        self.act(y)
        return y * 2


class Features(nn.Module):
    """Gives what the norm gives, too."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return {"normed": y, "out": self.act(y)}


class Keeps(nn.Module):
    """Leaves what the norm gives where a loss will look for it."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        self.normed = {"last": self.bn(x)}
        return self.act(self.normed["last"])


class Output:
    def __init__(self, normed, out):
        self.normed, self.out = normed, out

    def values(self):
        return [self.normed, self.out]


class OwnOutput(nn.Module):
    """Gives an object of a class that torch does not know."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return Output(y, self.act(y))


class InAList(nn.Module):
    """The model calls its norm by a list of its own, which no converter can see."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()
        self.layers = [self.bn, self.act]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class BeginsAsNothing(nn.Module):
    """Asks what its activation is, in a branch whose norm begins with a weight of 0."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()
        nn.init.zeros_(self.bn.weight)

    def forward(self, x):
        return inspected(self, x) + x


class Logs(nn.Module):
    """Keeps things in a list, a dict and a generator."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()
        self.seen, self.counts, self.generator = [], {"calls": 0}, torch.Generator()

    def forward(self, x):
        self.seen.append(len(self.seen))
        self.counts["calls"] += 1
        return self.act(self.bn(x + torch.rand((), generator=self.generator)))


class TwoPlaces(nn.Module):
    """A block registered under two names."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.stages = nn.ModuleList([self.block])
        self.norm = self.block[1]

    def forward(self, x):
        return self.stages[0](x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(x))


class Looks(nn.Module):
    """Code that asks the activation something that an nn.Identity cannot answer."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn(x)
        return self.act(y) if self.act.inplace else self.act(y.clone())


class Apart(nn.Module):
    """The norm in one module, activation and dropout in its parent, by keyword."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity())
        self.act, self.drop = nn.ELU(0.5), nn.Dropout2d(0.3)

    def forward(self, x):
        return self.drop(input=self.act(self.inner(x)))


class ActFirst(nn.Module):
    """ECAPA's block: the activation ahead of the norm, and a dropout behind."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.bn, self.drop = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), nn.Dropout(0.2)

    def forward(self, x):
        return self.drop(self.bn(self.act(self.conv(x))))


class TwoNorms(nn.Module):
    """An activation between two norms belongs to one of them."""

    def __init__(self):
        super().__init__()
        self.one, self.act, self.two = nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.two(self.act(self.one(x)))


class Recurrent(nn.Module):
    """A block called several times in one forward."""

    def __init__(self):
        super().__init__()
        self.block = ConvNormAct(nn.Tanh(), 3, 3)

    def forward(self, x):
        return self.block(self.block(x))


class Counting(nn.Module):
    """Changes with every call: a buffer, torch's and Python's generators."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.act(self.bn(x + torch.rand(()) + random.random()))


class Remembers(nn.Module):
    """Counts its calls in Python, and begins something in the first one."""

    def __init__(self):
        super().__init__()
        self.bn, self.act, self.calls = nn.BatchNorm2d(3), nn.ReLU(), 0

    def forward(self, x):
        if self.calls == 0:
            self.first = float(x.sum())
        self.calls += 1
        return self.act(self.bn(x * self.calls + self.first))


class Case(nn.Module):
    """A norm, an activation, and a function of both."""

    def __init__(self, function, act):
        super().__init__()
        self.bn, self.act, self.function = nn.BatchNorm2d(3), act, function
        self.kept = [act]

    def forward(self, x):
        return self.function(self, x)


def rectified_ahead(m, x):
    y = x * 2
    return m.bn(m.act(y)) + y


def viewed_ahead(m, x):
    y = x * 2
    seen = y.view(-1)
    return m.bn(m.act(y)) + seen.view_as(y)


def written_behind_the_act(m, x):
    y = x * 2
    z = m.act(y)
    y.add_(1)
    return m.bn(z) + y


def gradients_off(m, x):
    y = m.bn(x)
    with torch.no_grad():
        z = m.act(y)
    return z + x * m.bn.weight.sum()


def gradients_off_ahead(m, x):
    with torch.no_grad():
        z = m.act(x)
    return m.bn(z) + x


def by_reference(m, x):
    return m.kept[0](m.bn(x))


class Dict(dict):
    pass


def in_a_dict(m, x):
    y = m.bn(x)
    return Dict(normed=y, out=m.act(y))


@torch.jit.script
def swish(x):
    return x * torch.sigmoid(x)


def scripted(m, x):
    y = m.bn(x)
    z = swish(y)
    return m.act(y) + z


def inspected(m, x):
    y = m.act(m.bn(x))
    return y if isinstance(m.act, nn.ReLU) else y * 2


def by_mode(m, x):
    y = m.bn(x)
    return m.act(y) + (0 if m.training else y)


def checkpointed(m, x):
    """What the function takes is kept for its backward, and what the activation gives is written."""

    def body(y):
        y = m.act(y)
        y += 1.0
        return y * 2

    return checkpoint(body, m.bn(x), use_reentrant=False)


def hooked(m, x):
    """The hook's gradient is that of what the norm gives."""
    y = m.bn(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 2)
    return m.act(y)


FUNCTIONS = {  # what stands in the way of -> the activation, and what becomes of the norm
    rectified_ahead: (lambda: nn.ReLU(inplace=True), "norm"),
    viewed_ahead: (lambda: nn.ReLU(inplace=True), "norm"),
    written_behind_the_act: (nn.ReLU, "norm"),
    gradients_off: (nn.ReLU, "norm"),
    gradients_off_ahead: (nn.ReLU, "norm"),
    by_reference: (nn.SiLU, None),
    in_a_dict: (nn.ReLU, "norm"),
    scripted: (nn.ReLU, None),
    inspected: (nn.ReLU, None),
    by_mode: (nn.ReLU, None),
    hooked: (nn.ReLU, "norm"),
    checkpointed: (nn.SiLU, "norm"),
}


def sequence(act=None):
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), act or nn.GELU(), nn.Dropout(0.1)),
        *(nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5), nn.ReLU()),
    )


def step(model, x):
    """Outputs, gradients and buffers of a training step and of an evaluation."""
    torch.manual_seed(5)
    random.seed(5)
    found = []
    for training in (True, False):
        model.train(training).zero_grad()
        x = x.detach().requires_grad_()
        out = model(x)
        out = [out] if isinstance(out, torch.Tensor) else list(out.values())
        sum(o.square().sum() for o in out).backward()
        found += [*out, x.grad, *(p.grad for p in model.parameters())]
    return [*found, *(b.double() for b in model.buffers())]
