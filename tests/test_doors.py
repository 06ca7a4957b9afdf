"""Out of every door that the stock layers pass: exported, traced, scripted, packaged, quantised, split into stages.

While that happens the stages run as plain torch, so what comes out holds no operator of ours and needs no fusednorm.
Evaluation is compared with eager in numbers, training in what can be: shapes, gradients, statistics.
"""

import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import fusednorm
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, functional

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

# One layer for each order of one kind, each noise, and each option that changes the stages.
LAYERS = {
    "default": {},
    "alone": {"act": None, "drop": None},
    "act-norm-drop": {"order": "act-norm-drop"},
    "drop-act-norm": {"order": "drop-act-norm"},
    "norm-drop-add-act": {"order": "norm-drop-add-act"},
    "norm-act-drop-add": {"order": "norm-act-drop-add", "act": "gelu"},
    "prelu": {"act": "prelu"},
    "channel": {"drop": nn.Dropout2d(0.3)},
    "uniform": {"drop": fusednorm.UniformDropout(0.3)},
    "gaussian": {"drop": fusednorm.GaussianDropout(0.3)},
    "drop path": {"drop": fusednorm.DropPath(0.3)},
    "ghost": {"ghost_batch_size": 2},
    "matched": {"order": "drop-norm-act", "eval_matched_stats": True},
    "cumulative": {"momentum": None},
    "not tracked": {"track_running_stats": False},
    "not affine": {"affine": False},
}
layers = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.layer = FusedBatchNorm2d(8, **{"act": "relu", "drop": 0.3} | options)
        self.adds = "add" in self.layer.order
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        z = self.conv(x)
        y = self.layer(z, torch.sigmoid(z)) if self.adds else self.layer(z)
        return self.head(y.mean((2, 3)))


def net(options, training=False):
    torch.manual_seed(1)
    model = Net(**options)
    model(torch.randn(6, 3, 8, 8))  # running statistics that differ from 0 and 1
    return model.train(training)


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
BATCH = ({0: torch.export.Dim("batch")},)


class TestExport:
    @layers
    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
    def test_evaluation(self, strict, options):
        """Called and differentiated with the grad mode on, at another batch size."""
        model = net(options)
        program = torch.export.export(model, (X,), strict=strict, dynamic_shapes=BATCH)
        assert "fusednorm" not in str(program.graph)
        torch.testing.assert_close(program.module()(X[:3]), model(X[:3]))
        program.module()(X).sum().backward()

    @layers
    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
    def test_training(self, strict, options):
        model = net(options, training=True)
        shapes = None if "ghost_batch_size" in options else BATCH  # the number of groups is part of the program
        program = torch.export.export(model, (X,), strict=strict, dynamic_shapes=shapes)
        assert "fusednorm" not in str(program.graph)
        module, before = program.module(), int(model.layer.num_batches_tracked or 0)
        module(X if shapes is None else X[:3]).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        if model.layer.track_running_stats:
            groups = 2 if "ghost_batch_size" in options else 1
            assert int(module.state_dict()["layer.num_batches_tracked"]) == before + groups

    @pytest.mark.parametrize("name", ["default", "matched", "cumulative", "ghost", "norm-drop-add-act"])
    def test_training_without_noise_is_eager_training(self, name):
        options = LAYERS[name] | {"drop": 0.0}
        ours, model = net(options, training=True), net(options, training=True)
        module = torch.export.export(model, (X,)).module()
        torch.testing.assert_close(module(X), ours(X))
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(module.state_dict()[key], value, msg=key)

    def test_noise_of_an_exported_program(self):
        """Stock noise from stock's stream, at the strength of the layer."""
        for drop in (0.3, nn.Dropout2d(0.3), fusednorm.DropPath(0.3), fusednorm.UniformDropout(0.9)):
            layer = FusedBatchNorm2d(64, affine=False, drop=drop)
            x = torch.randn(256, 64, 2, 2)
            module = torch.export.export(layer, (x,)).module()
            z = nn.functional.batch_norm(x, None, None, training=True)
            m = module(x) / z
            assert (m.mean() - 1).abs() < 0.15
            alpha = fusednorm.analysis.alpha_of(layer.drop)
            assert (m.var() / alpha - 1).abs() < 0.2

    def test_loads_without_fusednorm(self, tmp_path):
        program = torch.export.export(net({}), (X,), dynamic_shapes=BATCH)
        torch.export.save(program, tmp_path / "net.pt2")
        torch.save((X[:3], net({})(X[:3]).detach()), tmp_path / "pair.pt")
        script = (
            "import sys, torch; p = torch.export.load(sys.argv[1]).module(); x, y = torch.load(sys.argv[2]); "
            "torch.testing.assert_close(p(x), y); assert 'fusednorm' not in sys.modules; print('same')"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "net.pt2", tmp_path / "pair.pt"], capture_output=True, text=True
        )
        assert done.stdout.strip() == "same", done.stderr

    @pytest.mark.slow
    def test_aot_inductor(self, tmp_path):
        model = net({})
        program = torch.export.export(model, (X,), dynamic_shapes=BATCH)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(X[:3]), model(X[:3]))

    def test_pipelining(self):
        from torch.distributed.pipelining import SplitPoint, pipeline

        def block(channels):
            return nn.Sequential(nn.Conv2d(channels, 8, 3), FusedBatchNorm2d(8, act="relu", drop=0.1))

        model = nn.Sequential(block(3), block(8)).eval()
        pipe = pipeline(model, (X,), split_spec={"1": SplitPoint.BEGINNING})
        first, last = pipe.get_stage_module(0), pipe.get_stage_module(1)
        assert pipe.num_stages == 2
        torch.testing.assert_close(last(first(X)), model(X))

    @pytest.mark.slow
    @pytest.mark.parametrize("qat", [False, True], ids=["PTQ", "QAT"])
    def test_pt2e_quantisation(self, qat):
        """Folded as the stock layers are: no batch norm is left, and the numbers are those of the stock model."""
        pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        results = []
        for fused in (True, False):
            model = net({"drop": None}, training=qat)
            if not fused:
                model.layer = model.layer.to_torch()
            module = torch.export.export(model, (X,)).module()
            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=qat))
            prepared = (pt2e.prepare_qat_pt2e if qat else pt2e.prepare_pt2e)(module, quantizer)
            prepared(X)
            converted = pt2e.convert_pt2e(prepared)
            assert "batch_norm" not in converted.code
            results.append(converted(X))
        torch.testing.assert_close(*results, rtol=0, atol=5e-3)  # a value on an edge falls to either side: one step


class TestOnnx:
    @layers
    @pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
    def test_onnxruntime(self, dynamo, options, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        if not dynamo and not options.get("track_running_stats", True):
            pytest.skip("the TorchScript exporter has no batch norm without running statistics, stock neither")
        model, path = net(options), str(tmp_path / "net.onnx")
        torch.onnx.export(model, (X,), path, dynamo=dynamo, **({"verbose": False} if dynamo else {}))
        session = onnxruntime.InferenceSession(path)
        (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(X).detach(), rtol=1e-4, atol=1e-5)


class TestTracing:
    @layers
    def test_jit_trace(self, options):
        model = net(options)
        traced = torch.jit.trace(model, (X,))
        assert "fusednorm::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(X[:3]), model(X[:3]))

    def test_jit_trace_is_as_quiet_as_of_stock_layers(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            torch.jit.trace(net({}), (X,))

    def test_jit_trace_in_training(self):
        traced = torch.jit.trace(net({}, training=True), (X,), check_trace=False)
        assert "fusednorm::" not in str(traced.inlined_graph)
        traced(X).sum().backward()

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("options", [{}, {"order": "act-norm-drop"}, {"act": "prelu"}, {"drop": nn.Dropout2d(0.3)}])
    def test_jit_script(self, options, training):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), FusedBatchNorm2d(8, **{"act": "relu", "drop": 0.0} | options))
        model.train(training)
        if training and isinstance(options.get("drop"), nn.Module):
            pytest.skip("noise of another stream")
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(X), model(X))

    def test_add_graph(self, tmp_path):
        tensorboard = pytest.importorskip("torch.utils.tensorboard")
        with tensorboard.SummaryWriter(str(tmp_path)) as writer:
            writer.add_graph(net({}), X)
        assert any(tmp_path.iterdir())

    def test_make_fx(self):
        from torch.fx.experimental.proxy_tensor import make_fx

        model = net({})
        torch.testing.assert_close(make_fx(model)(X)(X), model(X))


class TestFx:
    def test_symbolic_trace(self):
        """Layers are leaves, as torch's own are, with their residuals and seeds; so are noises alone."""

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3)
                self.first = FusedBatchNorm2d(8, act="relu", drop=0.3)
                self.second = FusedBatchNorm2d(8, act="relu", drop=0.3, order="norm-add-act-drop")
                self.noise = fusednorm.UniformDropout(0.2)

            def forward(self, x):
                z = self.conv(x)
                return self.noise(self.second(self.first(z, seed=4), residual=z, seed=5))

        model = Block()
        graph = torch.fx.symbolic_trace(model)
        targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
        assert targets == ["conv", "first", "second", "noise"]
        model.noise.eval()
        torch.testing.assert_close(graph(X), model(X))
        model.eval()
        torch.testing.assert_close(graph.eval()(X), model(X))
        from torch.fx.passes.shape_prop import ShapeProp

        ShapeProp(graph).propagate(X)
        assert graph.graph.output_node().args[0].meta["tensor_meta"].shape == (4, 8, 6, 6)

    def test_functions(self):
        """The functions are nodes, as torch's own are."""
        options = {"act": "relu", "p": 0.3, "granularity": "channel", "seed": 3}
        weight, bias, mean, var = torch.rand(4, 3)

        def model(x, residual):
            z = functional.batch_norm_act_drop(
                x, mean, var, weight, bias, order="norm-act-drop-add", residual=residual, drop_training=True, **options
            )
            return functional.dropout(z, 0.4, seed=4)

        graph = torch.fx.symbolic_trace(model)
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert targets == [functional.batch_norm_act_drop, functional.dropout]
        torch.testing.assert_close(graph(X, 2 * X), model(X, 2 * X), rtol=0, atol=0)

    @pytest.mark.parametrize("seed", [None, 3])
    def test_other_tracers(self, seed):
        """prepare_fx and feature extractors bring tracers of their own, which ask again whether a layer is a leaf."""

        class Names(torch.fx.Tracer):
            def call_module(self, m, forward, args, kwargs):
                seen.append(self.path_of_module(m))
                return super().call_module(m, forward, args, kwargs)

            def is_leaf_module(self, m, qualified):
                return False if "fusednorm" in type(m).__module__ else super().is_leaf_module(m, qualified)

        seen = []
        model = nn.Sequential(nn.Conv2d(3, 8, 3), FusedBatchNorm2d(8, act="relu"))
        graph = torch.fx.GraphModule(model, Names().trace(model))
        assert "1" in seen
        torch.testing.assert_close(graph.eval()(X), model.eval()(X))

    def test_prepare_fx(self):
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), FusedBatchNorm2d(8, act="relu", drop=0.3)).eval()
        prepared = prepare_fx(model, get_default_qconfig_mapping(), (X,))
        torch.testing.assert_close(prepared(X), model(X))
        assert (convert_fx(prepared)(X) - model(X)).abs().max() < 0.1


class TestPackage:
    def test_torch_package(self):
        from torch.package import PackageExporter, PackageImporter

        file, model = io.BytesIO(), net({})
        module = nn.Sequential(model.conv, model.layer)
        with PackageExporter(file) as exporter:
            exporter.extern("fusednorm.**")
            exporter.save_pickle("net", "net.pkl", module)
        file.seek(0)
        torch.testing.assert_close(PackageImporter(file).load_pickle("net", "net.pkl")(X), module(X))

    def test_noises_alone(self):
        for noise in (fusednorm.UniformDropout(0.3), fusednorm.GaussianDropout(0.3), fusednorm.DropPath(0.3)):
            model = nn.Sequential(nn.Conv2d(3, 8, 3), noise)
            for training in (False, True):
                model.train(training)
                program = torch.export.export(model, (X,))
                assert "fusednorm" not in str(program.graph)
                y = program.module()(X)
                assert torch.equal(y, model(X)) or training
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                traced = torch.jit.trace(model.eval(), (X,))
            torch.testing.assert_close(traced(X), model(X))


def test_shapes_of_one_dimension():
    layer = nn.Sequential(nn.Linear(5, 6), FusedBatchNorm1d(6, act="silu", drop=0.3)).eval()
    for x in (torch.randn(7, 5),):
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
