"""The models that `make models` trains: public ones with random weights, at sizes that two cores train in a second.

Each builds itself, and imports its package only then; inputs are shapes of random values, or functions that make them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def _edges(nodes: int) -> torch.Tensor:
    return torch.randint(nodes, (2, 4 * nodes))


def torchvision(name: str, **options) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, **options)


def timm(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def smp_unet(encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet(encoder, encoder_weights=None)


def yolo(name: str) -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", verbose=False)


def ecapa(dropout: float = 0.0) -> nn.Module:
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    return ECAPA_TDNN(80, lin_neurons=192, channels=[512] * 4 + [1536], dropout=dropout)


def tacotron2_postnet() -> nn.Module:
    from torchaudio.models import Tacotron2

    return Tacotron2().postnet


class Tacotron2(nn.Module):
    """The whole of it, for texts of 40 tokens."""

    def __init__(self) -> None:
        super().__init__()
        from torchaudio.models import Tacotron2

        self.net = Tacotron2()

    def forward(self, mel):
        samples, _, steps = mel.shape
        tokens = torch.arange(40).remainder(148).expand(samples, -1)
        return self.net(tokens, torch.full((samples,), 40), mel, torch.full((samples,), steps))


def braindecode(name: str) -> nn.Module:
    from braindecode import models

    return getattr(models, name)(n_chans=22, n_outputs=4, n_times=1000, sfreq=250)


def pyg(name: str, *arguments, **options) -> nn.Module:
    from torch_geometric import nn as pyg

    return getattr(pyg, name)(*arguments, **options)


class OGB(nn.Module):
    """The GCN of the Open Graph Benchmark's examples (Hu et al. 2020)."""

    def __init__(self, inside: int, hidden: int, outside: int, p: float = 0.5) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        widths = [inside, hidden, hidden, outside]
        self.convs = nn.ModuleList(GCNConv(a, b, cached=True) for a, b in zip(widths, widths[1:], strict=False))
        self.bns = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(2))
        self.dropout = p

    def forward(self, x, edge_index):
        for conv, bn in zip(self.convs, self.bns, strict=False):
            x = F.relu(bn(conv(x, edge_index)))
            x = F.dropout(x, p=self.dropout, training=self.training)
        return self.convs[-1](x, edge_index).log_softmax(-1)


class DeepGCN(nn.Module):
    """DeeperGCN's layers (Li et al. 2020), as PyG's example has them."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        from torch_geometric.nn import BatchNorm, DeepGCNLayer, GENConv

        self.layers = nn.ModuleList(
            DeepGCNLayer(GENConv(width, width), BatchNorm(width), nn.ReLU(inplace=True), block="res+", dropout=0.1)
            for _ in range(layers)
        )

    def forward(self, x, edge_index):
        for layer in self.layers:
            x = layer(x, edge_index)
        return x


class TabNet(nn.Module):
    """Without its loss of sparsity."""

    def __init__(self, features: int, virtual_batch_size: int) -> None:
        super().__init__()
        from pytorch_tabnet.tab_network import TabNetNoEmbeddings

        sizes = {"n_d": 32, "n_a": 32, "n_steps": 3, "virtual_batch_size": virtual_batch_size}
        self.net = TabNetNoEmbeddings(features, 2, **sizes)
        encoder = self.net.encoder
        groups = encoder.__dict__.pop("group_attention_matrix")  # which stays float32 otherwise, whatever the model is
        encoder.register_buffer("group_attention_matrix", groups, persistent=False)

    def forward(self, x):
        return self.net(x)[0]


class FastaiTabular(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from fastai.tabular.model import TabularModel

        self.net = TabularModel([(20, 10)] * 4, 24, 2, [1000, 500], ps=0.1, embed_p=0.04)

    def forward(self, x):
        return self.net(torch.zeros(len(x), 4, dtype=torch.long), x)


def fastai_head_on_resnet18() -> nn.Module:
    from fastai.vision.learner import create_head

    return nn.Sequential(*list(torchvision("resnet18").children())[:-2], create_head(512, 10))


def monai_unet3d() -> nn.Module:
    from monai.networks import nets

    levels = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2), "num_res_units": 2}
    return nets.UNet(3, 1, 2, **levels, norm="batch", dropout=0.2, act="PRELU")


def monai_basic_unet3d() -> nn.Module:
    from monai.networks import nets

    return nets.BasicUNet(3, 1, 2, features=(32, 32, 64, 128, 256, 32), norm="batch")


def nnunet_dropout3d() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    shape = {"n_stages": 4, "features_per_stage": (32, 64, 128, 256), "strides": (1, 2, 2, 2), "kernel_sizes": 3}
    layers = {"conv_op": nn.Conv3d, "norm_op": nn.BatchNorm3d, "nonlin": nn.LeakyReLU, "conv_bias": True}
    layers |= {"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.2}, "nonlin_kwargs": {"inplace": True}}
    return PlainConvUNet(1, num_classes=2, n_conv_per_stage=2, n_conv_per_stage_decoder=2, **shape, **layers)


def _pictures(batch: int, size: int) -> tuple:
    return ((batch, 3, size, size),)


Entry = tuple[str, Callable[[], nn.Module], tuple]  # name, build, inputs
_eeg, _volume = ((16, 22, 1000),), ((2, 1, 32, 32, 32),)
_graph = ((50_000, 128), partial(_edges, 50_000))
MODELS: list[Entry] = [
    ("torchvision resnet18", partial(torchvision, "resnet18"), _pictures(8, 224)),
    ("torchvision resnet50", partial(torchvision, "resnet50"), _pictures(8, 128)),
    ("torchvision densenet121, drop_rate .2", partial(torchvision, "densenet121", drop_rate=0.2), _pictures(4, 160)),
    ("torchvision mobilenet_v3_large", partial(torchvision, "mobilenet_v3_large"), _pictures(16, 160)),
    ("torchvision efficientnet_b0", partial(torchvision, "efficientnet_b0"), _pictures(8, 160)),
    ("torchvision googlenet", partial(torchvision, "googlenet", init_weights=False), _pictures(8, 160)),
    ("timm resnet26d", partial(timm, "resnet26d"), _pictures(8, 160)),
    ("timm efficientnet_b0, drop_path .2", partial(timm, "efficientnet_b0", drop_path_rate=0.2), _pictures(8, 160)),
    ("smp Unet resnet34", partial(smp_unet, "resnet34"), _pictures(4, 128)),
    ("ultralytics yolov8n", partial(yolo, "yolov8n"), _pictures(8, 160)),
    ("fastai head on resnet18", fastai_head_on_resnet18, _pictures(16, 112)),
    ("fastai tabular", FastaiTabular, ((1024, 24),)),
    ("monai UNet 3-D, PReLU", monai_unet3d, ((4, 1, 32, 32, 32),)),
    ("monai BasicUNet 3-D", monai_basic_unet3d, _volume),
    ("nnU-Net PlainConvUNet, Dropout3d", nnunet_dropout3d, _volume),
    ("braindecode EEGNet", partial(braindecode, "EEGNet"), _eeg),
    ("braindecode EEGInceptionERP", partial(braindecode, "EEGInceptionERP"), _eeg),
    ("braindecode EEGITNet", partial(braindecode, "EEGITNet"), _eeg),
    ("OGB GCN", partial(OGB, 128, 256, 40), _graph),
    ("PyG GIN", partial(pyg, "GIN", 128, 64, 3, 40, dropout=0.5, norm="batch_norm"), _graph),
    ("PyG MLP", partial(pyg, "MLP", [128, 256, 256, 40], dropout=0.5), ((50_000, 128),)),
    ("PyG DeepGCN, 7 layers", partial(DeepGCN, 64, 7), ((20_000, 64), partial(_edges, 20_000))),
    ("TabNet", partial(TabNet, 32, 128), ((4096, 32),)),
    ("speechbrain ECAPA-TDNN", ecapa, ((16, 300, 80),)),
    ("torchaudio Tacotron2", Tacotron2, ((8, 80, 60),)),
    ("torchaudio Tacotron2's postnet", tacotron2_postnet, ((16, 80, 400),)),
]
# Small ones, for the tests.
QUICK: list[Entry] = [
    ("torchvision resnet18", partial(torchvision, "resnet18"), _pictures(2, 48)),
    ("timm efficientnet_b0, drop_path .2", partial(timm, "efficientnet_b0", drop_path_rate=0.2), _pictures(2, 64)),
    ("fastai tabular", FastaiTabular, ((64, 24),)),
    ("braindecode EEGInceptionERP", partial(braindecode, "EEGInceptionERP"), ((4, 22, 1000),)),
    ("PyG GIN", partial(pyg, "GIN", 16, 8, 3, 4, dropout=0.5, norm="batch_norm"), ((200, 16), partial(_edges, 200))),
    ("TabNet", partial(TabNet, 8, 32), ((128, 8),)),
]
