"""A graph network: who belongs to which community, from who knows whom.

    python examples/graph.py [--out DIR] [--seed 0] [--quick]

The graph is generated, a stochastic block model: people of one community know each other more often than people of
different ones, and each has a few features that say little by themselves. A graph convolution averages over the people
that one knows; behind each stands what stands there in public models of the kind: BatchNorm, ReLU, dropout. The same
net is trained with the stock layers and with the fused one, and once more on the features alone. Convolutions are plain
torch, one sparse matrix product each.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402  (what follows is found through the line above, or by it)
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from examples import common  # noqa: E402
from fusednorm import FusedBatchNorm1d  # noqa: E402

KINDS = {
    "stock": "graph net, BatchNorm1d + ReLU + Dropout",
    "fused": "graph net, FusedBatchNorm1d",
    "alone": "features alone, FusedBatchNorm1d",
}
COMMUNITIES, FEATURES, WIDTH, DROP = 5, 16, 32, 0.5
INSIDE, BETWEEN = 0.03, 0.006  # the chances of an edge
SIGNAL = 0.25  # of a community in each feature, in deviations of its noise
LABELLED = 0.1  # of the nodes


@dataclass(frozen=True)
class Graph:
    adjacency: torch.Tensor  # dense, 0 and 1
    weights: torch.Tensor  # sparse: that with each node beside its neighbours, scaled on both sides (Kipf & Welling)
    features: torch.Tensor
    community: torch.Tensor
    known: torch.Tensor  # the nodes to learn from; the others are the test


def generate(seed: int, nodes: int) -> Graph:
    draw = torch.Generator().manual_seed(seed)
    community = torch.arange(nodes) * COMMUNITIES // nodes
    same = community[:, None] == community
    above = torch.rand(nodes, nodes, generator=draw).triu(1)
    adjacency = ((above > 0) & (above < torch.where(same, INSIDE, BETWEEN))).float()
    adjacency = adjacency + adjacency.T
    linked = adjacency + torch.eye(nodes)
    scale = linked.sum(1).rsqrt()
    centres = SIGNAL * torch.randn(COMMUNITIES, FEATURES, generator=draw)
    features = centres[community] + torch.randn(nodes, FEATURES, generator=draw)
    known = torch.rand(nodes, generator=draw) < LABELLED
    return Graph(adjacency, (scale[:, None] * linked * scale).to_sparse(), features, community, known)


def block(channels: int, kind: str, drop: float) -> nn.Module:
    if kind == "stock":
        return nn.Sequential(nn.BatchNorm1d(channels), nn.ReLU(), nn.Dropout(drop))
    return FusedBatchNorm1d(channels, act="relu", drop=drop)


class Net(nn.Module):
    def __init__(self, kind: str, seed: int, drop: float = DROP):
        super().__init__()
        torch.manual_seed(seed)
        sizes = FEATURES, WIDTH, WIDTH
        pairs = zip(sizes, sizes[1:], strict=False)
        self.linear = nn.ModuleList(nn.Linear(before, after, bias=False) for before, after in pairs)
        self.last = nn.Linear(WIDTH, COMMUNITIES)
        self.blocks = nn.ModuleList(block(channels, kind, drop) for channels in sizes[1:])
        self.alone = kind == "alone"

    def forward(self, graph: Graph) -> torch.Tensor:
        x = graph.features
        for linear, block in zip(self.linear, self.blocks, strict=True):
            x = block(self.spread(graph, linear(x)))
        return self.spread(graph, self.last(x))

    def spread(self, graph: Graph, x: torch.Tensor) -> torch.Tensor:
        return x if self.alone else graph.weights @ x


def run(kind: str, graph: Graph, seed: int, epochs: int) -> list[float]:
    """Accuracy on the nodes without a label, after every epoch."""
    net, rest, right = Net(kind, seed), ~graph.known, []

    def loss(_):
        net.eval()
        with torch.no_grad():
            right.append(common.accuracy(net(graph)[rest], graph.community[rest]))
        net.train()
        return cross_entropy(net(graph)[graph.known], graph.community[graph.known])

    common.train(net, loss, range(epochs), epochs, rate=1e-2)
    return right


def fused_against_stock(graph: Graph, seed: int) -> float:
    """Largest difference of the two nets' outputs in training, dropout off, in float64, beside the largest output."""
    weights = graph.weights.to_dense().double().to_sparse()
    graph = Graph(graph.adjacency, weights, graph.features.double(), graph.community, graph.known)
    stock, fused = (Net(kind, seed, drop=0.0).double()(graph) for kind in ("stock", "fused"))
    return ((stock - fused).abs().max() / stock.abs().max()).item()


def draw(figure, graph: Graph, found: dict) -> None:
    picture, curves = figure.subplots(1, 2, width_ratios=(1, 1.7))
    rows, columns = graph.adjacency.nonzero().T
    picture.scatter(columns, rows, s=0.6, lw=0, color=[f"C{c % 4}" for c in graph.community[rows]], rasterized=True)
    picture.set(title="who knows whom, sorted by community", xlabel="person", ylabel="person", aspect="equal")
    picture.invert_yaxis()
    for (kind, name), (colour, line, width) in zip(
        KINDS.items(), (("C3", "-", 3), ("C0", "--", 1.5), ("C1", "-", 1.5)), strict=True
    ):
        values = np.array(found[kind])
        epochs = range(values.shape[1])
        curves.plot(epochs, values.mean(0), line, lw=width, color=colour, label=name)
        curves.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
    curves.axhline(1 / COMMUNITIES, color="C3", lw=0.8, ls=":")
    above = {"xytext": (0, 2), "textcoords": "offset points", "ha": "right", "fontsize": "small"}
    curves.annotate("by chance", (epochs[-1], 1 / COMMUNITIES), **above)
    curves.yaxis.set_major_formatter("{x:.0%}")
    curves.set(xlabel="epoch", ylabel="right on people without a label", ylim=(0, None))
    curves.set_title(f"mean and range of {len(found['fused'])} nets")
    curves.legend(loc="lower right")


def main() -> int:
    arguments = common.options(__doc__)
    seeds, epochs, nodes = (3, 40, 600) if arguments.quick else (8, 100, 1500)
    graphs = [generate(arguments.seed + i, nodes) for i in range(seeds)]
    graph = graphs[0]
    degree = graph.adjacency.sum(1).mean()
    print(f"{nodes} people in {COMMUNITIES} communities, {degree:.0f} acquaintances each, {graph.known.sum()} labelled")
    print(f"fused against stock, dropout off, float64: {fused_against_stock(graph, arguments.seed):.0e} of the output")
    found = {kind: [run(kind, g, arguments.seed + i, epochs) for i, g in enumerate(graphs)] for kind in KINDS}
    last = {kind: [values[-1] for values in runs] for kind, runs in found.items()}
    for kind, values in last.items():
        print(f"{KINDS[kind]}: {np.mean(values):.1%} right")
    print(f"fused less stock: {common.difference(last['fused'], last['stock'], '.2%')}")
    print(f"with the graph less without: {common.difference(last['fused'], last['alone'], '.2%')}")
    common.pictures("graph", arguments.out, (9, 3.6), lambda figure: draw(figure, graph, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
