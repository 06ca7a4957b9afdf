"""What readers call a measured layer: "a ResNet layer, 64x56x56, batch 64", not the name of a workload."""

from __future__ import annotations

KINDS = {  # what a workload's name begins with
    "cnn": "a ResNet layer",
    "tacotron2_postnet": "a Tacotron 2 layer (speech)",
    "pointnet_head": "PointNet++'s head",
    "pointnet_seg": "a PointNet++ layer (segmentation)",
    "jasper": "a Jasper layer (speech)",
    "ogbn": "a graph network's layer (ogbn-arxiv)",
    "mag": "a graph MLP's layer (MAG240M)",
    "pcqm": "a molecule MLP's layer (PCQM4M)",
    "wrn": "a WideResNet layer",
    "fastai": "fastai's head",
    "crdnn": "a CRDNN layer (speech)",
    "erfnet": "an ERFNet layer (segmentation)",
    "eegsym": "an EEGSym layer (EEG)",
    "densenet": "a DenseNet layer",
    "dense": "an MLP layer",
    "efficientnet": "EfficientNet-B0's head",
}
TYPES = {"float32": "", "bfloat16": ", bfloat16", "float16": ", float16", "float64": ", float64"}


def size(shape: list[int]) -> str:
    if len(shape) == 2:
        return f"{shape[0]} rows of {shape[1]}"
    return f"{'x'.join(map(str, shape[1:]))}, batch {shape[0]}"


def layer(row: dict) -> str:
    """A row's layer in words; a workload that has none keeps its label."""
    kind = next((words for name, words in KINDS.items() if row["workload"].startswith(name)), None)
    if kind is None:
        return row["label"]
    last = ", channels-last" if row["layout"] == "channels-last" else ""
    level = ", AVX2" if row["level"] == "avx2" else ""
    return f"{kind}, {size(row['shape'])}{TYPES[row['dtype']]}{last}{level}"


def noise(row: dict) -> str:
    return f"dropout {row['p']:g}" if row["p"] else "no dropout"
