"""The models of the census: public ones, with random weights, at batches that people train them with.

Each source yields (name, build, inputs): `build` makes the model, `inputs` are shapes, or values for what is no
picture. A model that a release of its package no longer has, or that does not run, is named by the census and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from benchmarks import census_packages

Model = tuple[str, Callable[[], Callable], tuple]


def _pictures(batch: int, size: int) -> tuple:
    return ((batch, 3, size, size),)


def _torchvision() -> Iterator[Model]:
    from torchvision.models import get_model, segmentation, video

    sizes = {
        (8, 224): "resnet18 shufflenet_v2_x1_0",
        (4, 224): "densenet121 vgg11_bn",
        (8, 128): "resnet50 wide_resnet50_2 resnext50_32x4d vgg16_bn regnet_y_400mf regnet_x_800mf efficientnet_v2_s",
        (8, 160): "resnet34 googlenet efficientnet_b0 mnasnet1_0 densenet169",
        (16, 160): "mobilenet_v2 mobilenet_v3_large mobilenet_v3_small shufflenet_v2_x0_5",
        (4, 299): "inception_v3",
        (16, 128): "resnet101 efficientnet_b3",
    }
    for (batch, size), names in sizes.items():
        for name in names.split():
            plain = {"weights": None} | ({"init_weights": False} if name in ("googlenet", "inception_v3") else {})
            yield name, partial(get_model, name, **plain), _pictures(batch, size)
    for name in ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        how = partial(getattr(segmentation, name), weights=None, weights_backbone=None)
        yield name, how, _pictures(4, 192)
    for name, frames in (("r3d_18", 8), ("mc3_18", 8), ("r2plus1d_18", 8), ("s3d", 16)):
        size = 224 if name == "s3d" else 112
        yield name, partial(getattr(video, name), weights=None), ((2 if name == "s3d" else 4, 3, frames, size, size),)


def _timm() -> Iterator[Model]:
    import timm

    sizes = {
        (8, 160): "cspresnet50 dla34 dpn68 ghostnet_100 mixnet_s lcnet_100 hardcorenas_a tinynet_a rexnet_100 "
        "hrnet_w18_small res2net50_26w_4s ese_vovnet19b_dw mobilenetv4_conv_small cs3darknet_m gernet_s hgnet_tiny",
        (16, 128): "seresnet18 skresnet18 resnest14d selecsls42b regnetx_002 repvgg_a0 mobileone_s0 darknet53 "
        "cspdarknet53 resnet26d eca_resnet33ts efficientnet_lite0 starnet_s1 repghostnet_100",
        (8, 224): "levit_128 visformer_tiny mobilevit_s efficientformer_l1 convmixer_768_32 efficientvit_b0 fastvit_t8 "
        "tiny_vit_5m_224 coatnet_nano_rw_224 resnetv2_50t",
        (4, 299): "inception_v4 inception_resnet_v2 xception41",
    }
    for (batch, size), names in sizes.items():
        for name in names.split():
            yield f"timm {name}", partial(timm.create_model, name, pretrained=False), _pictures(batch, size)


def _segmentation() -> Iterator[Model]:
    import segmentation_models_pytorch as smp

    pairs = "Unet resnet34, UnetPlusPlus resnet18, Linknet resnet18, PSPNet resnet34, PAN resnet34, MAnet resnet18, "
    pairs += "DeepLabV3Plus mobilenet_v2, DeepLabV3 resnet18, Unet efficientnet-b0, UPerNet resnet18, Segformer mit_b0"
    for pair in pairs.split(", "):
        architecture, encoder = pair.split()
        yield f"smp {pair}", partial(getattr(smp, architecture), encoder, encoder_weights=None), _pictures(4, 128)


def _graphs() -> Iterator[Model]:
    from torch_geometric.nn import GAT, GCN, GIN, MLP, BatchNorm, DeepGCNLayer, GCNConv, GraphSAGE

    def edges(nodes):
        return torch.randint(nodes, (2, 4 * nodes))

    for name, make in (("GCN", GCN), ("GraphSAGE", GraphSAGE), ("GIN", GIN), ("GAT", GAT)):
        for nodes, width, act, p in ((50_000, 64, "relu", 0.5), (2708, 256, "elu", 0.2)):
            how = partial(make, 128, width, 3, 40, dropout=p, norm="batch_norm", act=act)
            yield f"PyG {name}", how, ((nodes, 128), partial(edges, nodes))
    yield "PyG MLP", partial(MLP, [256, 512, 512, 10], dropout=0.5), ((4096, 256),)
    yield "PyG MLP (point cloud)", partial(MLP, [6, 64, 64, 128, 1024], act="leaky_relu"), ((16384, 6),)

    class DeeperGCN(nn.Module):
        def __init__(self):
            super().__init__()
            make = partial(DeepGCNLayer, dropout=0.1)
            layers = [("res+", nn.ReLU(inplace=True)), ("res", nn.ReLU(inplace=True)), ("plain", nn.LeakyReLU(0.2))]
            self.layers = nn.ModuleList(make(GCNConv(64, 64), BatchNorm(64), act, block) for block, act in layers)

        def forward(self, x, edge_index):
            for layer in self.layers:
                x = layer(x, edge_index)
            return x

    yield "PyG DeepGCN", DeeperGCN, ((20_000, 64), partial(edges, 20_000))


def _fastai() -> Iterator[Model]:
    from fastai.tabular.model import TabularModel
    from fastai.vision.learner import create_head, create_unet_model
    from fastai.vision.models.xresnet import xresnet34, xresnet50
    from torchvision.models import resnet34

    class Table(TabularModel):
        def forward(self, x):
            return super().forward(torch.zeros(len(x), 4, dtype=torch.long), x)

    yield "fastai TabularModel", partial(Table, [(20, 10)] * 4, 24, 2, [200, 100], ps=0.1, embed_p=0.04), ((1024, 24),)
    yield "fastai TabularModel", partial(Table, [(20, 10)] * 4, 24, 2, [1000, 500], ps=[0.001, 0.01]), ((1024, 24),)
    yield "fastai head", partial(create_head, 512, 10), ((64, 512, 7, 7),)
    yield "fastai head", partial(create_head, 2048, 100, lin_ftrs=[512]), ((32, 2048, 4, 4),)
    yield "fastai xresnet34", xresnet34, _pictures(16, 128)
    yield "fastai xresnet50", xresnet50, _pictures(8, 128)
    yield "fastai unet", partial(create_unet_model, resnet34, 2, (128, 128), pretrained=False), _pictures(4, 128)


def _volumes() -> Iterator[Model]:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
    from monai.networks import nets

    volume, batch = ((4, 1, 32, 32, 32),), {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    levels = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2)}
    for act in ("PRELU", "RELU", ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})):
        how = {"num_res_units": 2, "norm": "batch", "dropout": 0.2, "act": act}
        yield "monai UNet", partial(nets.UNet, **batch, **levels, **how), volume
    yield "monai AttentionUnet", partial(nets.AttentionUnet, **batch, **levels, dropout=0.1), volume
    yield "monai BasicUNet", partial(nets.BasicUNet, **batch, features=(32, 32, 64, 128, 256, 32), norm="batch"), volume
    yield "monai SegResNet", partial(nets.SegResNet, **batch, init_filters=16, norm="batch", dropout_prob=0.2), volume
    yield "monai VNet", partial(nets.VNet, **batch), volume
    yield "monai HighResNet", partial(nets.HighResNet, **batch, dropout_prob=0.1), volume
    yield "monai DenseNet121", partial(nets.DenseNet121, **batch, dropout_prob=0.2), volume
    yield "monai resnet18", partial(nets.resnet18, spatial_dims=3, n_input_channels=1, num_classes=2), volume
    kernels = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3}
    yield "monai DynUNet", partial(nets.DynUNet, **batch, **kernels, norm_name="batch"), volume
    common = {"input_channels": 1, "n_stages": 4, "features_per_stage": (32, 64, 128, 256), "conv_op": nn.Conv3d}
    common |= {"kernel_sizes": 3, "strides": (1, 2, 2, 2), "num_classes": 2, "conv_bias": True}
    common |= {"norm_op": nn.BatchNorm3d, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
    plain = partial(PlainConvUNet, n_conv_per_stage=2, n_conv_per_stage_decoder=2, **common)
    yield "nnU-Net PlainConvUNet", plain, volume
    residual = partial(ResidualEncoderUNet, n_blocks_per_stage=(1, 3, 4, 6), n_conv_per_stage_decoder=1, **common)
    yield "nnU-Net ResidualEncoderUNet", residual, volume


def _speech() -> Iterator[Model]:
    from speechbrain.lobes.models.CRDNN import CRDNN
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    from speechbrain.lobes.models.ResNet import ResNet
    from speechbrain.lobes.models.Xvector import Xvector
    from torchaudio.models import Conformer, Tacotron2

    spoken = ((16, 300, 80),)
    yield "ECAPA-TDNN", partial(ECAPA_TDNN, 80, lin_neurons=192, channels=[512] * 4 + [1536]), spoken
    yield "ECAPA-TDNN dropout", partial(ECAPA_TDNN, 80, channels=[256] * 4 + [768], dropout=0.1), spoken
    yield "speechbrain CRDNN", partial(CRDNN, input_shape=[None, None, 40]), ((4, 200, 40),)
    yield "speechbrain Xvector", partial(Xvector, in_channels=80), spoken
    yield "speechbrain ResNet", partial(ResNet, 80, channels=[32, 64, 64, 128]), ((8, 300, 80),)
    yield "Tacotron2 postnet", lambda: Tacotron2().postnet, ((32, 80, 400),)
    yield "Tacotron2 encoder", lambda: nn.Sequential(*Tacotron2().encoder.convolutions), ((32, 512, 120),)
    conformer = partial(Conformer, 144, 4, 576, 4, 31, dropout=0.1)
    yield "Conformer", conformer, ((8, 200, 144), lambda: torch.full((8,), 200))


def _brains() -> Iterator[Model]:
    from braindecode import models

    signals, names = ((64, 22, 1000),), "EEGNet Deep4Net ShallowFBCSPNet ATCNet EEGITNet EEGNeX EEGSimpleConv EEGTCNet "
    names += "EEGInceptionERP EEGInceptionMI TIDNet TSception SCCNet SPARCNet ContraWR CTNet EEGConformer IFNet "
    names += "FBCNet FBLightConvNet FBMSNet MSVTNet SincShallowNet SSTDPN TCFormer"
    how = {"n_chans": 22, "n_outputs": 4, "n_times": 1000, "sfreq": 250}
    for name in names.split():
        yield f"braindecode {name}", partial(getattr(models, name), **how), signals
    for name, channels in (("USleep", 2), ("DeepSleepNet", 1)):
        night = {"n_chans": channels, "n_outputs": 5, "n_times": 3000, "sfreq": 100}
        yield f"braindecode {name}", partial(getattr(models, name), **night), ((32, channels, 3000),)


def _series() -> Iterator[Model]:
    from tsai.models import all as tsai

    for name in ["InceptionTime", "FCN", "ResNet", "ResCNN", "OmniScaleCNN", "XceptionTime", "XResNet1d", "LSTM_FCN"]:
        make = getattr(tsai, "xresnet1d34" if name == "XResNet1d" else name)
        length = {"seq_len": 500} if name in ("OmniScaleCNN", "LSTM_FCN") else {}
        yield f"tsai {name}", partial(make, 3, 5, **length), ((64, 3, 500),)
    yield "tsai XCM", partial(tsai.XCM, 3, 5, 500), ((32, 3, 500),)
    yield "tsai TST", partial(tsai.TST, 3, 5, 200, dropout=0.1), ((32, 3, 200),)
    yield "tsai PatchTST", partial(tsai.PatchTST, 3, 1, 512, 96), ((16, 3, 512),)


def _yolo() -> Iterator[Model]:
    from ultralytics.nn.tasks import ClassificationModel, DetectionModel, SegmentationModel

    for name in ["yolov8n", "yolov5n", "yolo11n", "yolov10n", "yolo12n", "yolov3-tiny", "yolov9c", "yolov8-ghost"]:
        yield name, partial(DetectionModel, f"{name}.yaml", verbose=False), _pictures(8, 160)
    yield "yolov8n-seg", partial(SegmentationModel, "yolov8n-seg.yaml", verbose=False), _pictures(8, 160)
    yield "yolov8s-cls", partial(ClassificationModel, "yolov8s-cls.yaml", verbose=False), _pictures(16, 128)


SOURCES = (
    _torchvision,
    _timm,
    _segmentation,
    _graphs,
    _fastai,
    _volumes,
    _speech,
    _brains,
    _series,
    _yolo,
)


def every_model() -> Iterator[Model]:
    census_packages.stand_in()
    for source in SOURCES:
        yield from source()
