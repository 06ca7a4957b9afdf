"""What can be said of a CUDA build without a GPU: `make cuda` runs this on the library that it has just compiled.

The library loads; every operator has its CUDA kernel; fake tensors on "cuda" pass through all of them; the CPU half
still computes; the machine code is for the architectures asked for; and no kernel keeps locals in memory where that
costs speed. Ends with a table of registers. What the kernels compute is for other tests.
"""

import argparse
import re
import subprocess
import sys
from collections import defaultdict

import torch
from cuda_machine.building import tool
from torch._subclasses.fake_tensor import FakeTensorMode

import fusednorm
from fusednorm import _hooks, _library, functional, reference

# As they stand in a kernel's first template argument. A stack is forgiven where a type is there for completeness.
TYPES = {"__nv_bfloat16": "bfloat16", "__half": "float16", "double": "float64", "float": "float32"}
FORGIVEN = {"float64", "float16"}


# Made of other operators on every device alike.
COMPOSITE = {"fusednorm::batch_norm_act_drop", "fusednorm::differentiable_backward"}


def operators():
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusednorm::"))
    return sorted(set(names) - COMPOSITE)


def check_registered():
    missing = [op for op in operators() if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")]
    assert operators() and not missing, f"no CUDA kernel is registered for {', '.join(missing) or 'anything'}"
    return f"{len(operators())} operators have CUDA kernels"


def check_fake():
    """Calls each operator; not through autograd, whose engine wants a real GPU even for fake tensors."""
    ops, called = torch.ops.fusednorm, set()

    def call(op, *arguments):
        results = op.default(*arguments)
        called.add(op._qualified_op_name)
        for t in results if isinstance(results, tuple) else [results] * isinstance(results, torch.Tensor):
            assert t.device == x.device, f"{op} of fake CUDA tensors gave one on {t.device}"
        return results

    with FakeTensorMode():
        x = torch.empty(4, 3, 5, 5, device="cuda", dtype=torch.bfloat16)
        a, b, mean, var = torch.empty(4, 3, device="cuda").unbind()
        batches = torch.zeros((), dtype=torch.int64, device="cuda")
        seed = call(ops.draw_seed, x)
        weight = torch.empty(3, device="cuda")
        chain = (seed, True, 1e-5, "act-norm-drop-add", "prelu", [], "bernoulli", 0.3, "element", 2)
        y, save_mean, invstd, var_seen, mean_seen, mask = call(
            ops.forward, x, a, b, mean, var, x, weight, *chain, True, True
        )
        assert save_mean.shape == invstd.shape == var_seen.shape == (2, 3)
        grads = call(ops.backward, y, x, a, b, None, weight, save_mean, invstd, mask, *chain, [True] * 5)
        assert [g.shape for g in (y, *grads)] == [x.shape, x.shape, a.shape, b.shape, x.shape, weight.shape]
        own = call(ops.statistics, x, weight, seed, "act-norm", *chain[4:-1], False)
        saved, settings = (
            (y, x, a, b, None, weight, own[0][:3], own[1][:3], y.new_empty(0, dtype=torch.uint8)),
            chain[2:-1],
        )
        sums = call(ops.gradient_sums, *saved, seed, *settings)
        assert sums.shape == (5, 3)
        apart = call(ops.backward_given, *saved, seed, sums, sums[0, 0], *settings, [True] * 3)
        assert [g.shape for g in apart] == [x.shape, x.shape, weight.shape]
        call(ops.update_stats_, mean, var, batches, save_mean, var_seen, 50, 50, 0.1)
        call(ops.noise, seed, [4, 3, 5, 5], 0.3, "bernoulli", "element", torch.float32)
        assert call(ops.dropout, x, seed, 0.3, "gaussian", "sample").shape == x.shape
        module = fusednorm.FusedBatchNorm2d(3, act="relu", drop=0.3, device="cuda")
        assert module(x).shape == x.shape
    assert called == set(operators()), f"not tried with fake tensors: {set(operators()) - called}"
    return "fake CUDA tensors pass through them"


def check_cpu():
    for shape in ((8, 6, 5, 5), (40, 6)):
        generator = torch.Generator().manual_seed(0)
        x, g = torch.randn(2, *shape, generator=generator)
        w, b = torch.rand(2, 6, generator=generator) + 0.5
        m = fusednorm.noise(shape, 0.3, seed=7)
        leaves = [[t.clone().requires_grad_() for t in (x, w, b)] for _ in range(2)]
        ours = functional.batch_norm_act_drop(
            leaves[0][0], None, None, *leaves[0][1:], training=True, act="elu", p=0.3, seed=7
        )
        theirs = reference.batch_norm_act_drop(
            leaves[1][0], None, None, *leaves[1][1:], training=True, act=("elu", 1.0), noise=m
        )
        for y in (ours, theirs):
            y.backward(g)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    return "the CPU operators compute"


# ---- machine code --------------------------------------------------------------------------------------------------
def machine_code(library):
    """Architectures ("9.0", and "9.0+PTX" where that is kept) and {(architecture, kernel): (registers, stack)}."""
    cuobjdump = tool("cuobjdump") or sys.exit("cuobjdump is needed, to read registers from the library")
    dump = subprocess.run([cuobjdump, "--dump-resource-usage", library], capture_output=True, text=True, check=True)
    names = subprocess.run(["c++filt"], input=dump.stdout, capture_output=True, text=True, check=True).stdout
    architectures, kernels = set(), {}
    for part in re.split(r"^Fatbin ", names, flags=re.M)[1:]:
        kind, number = part.split()[0], re.search(r"arch = sm_(\d+)(\d\w*)", part)
        arch = f"{number[1]}.{number[2]}"
        architectures.add(arch + "+PTX" * (kind == "ptx"))
        for name, registers, stack in re.findall(r"^ Function (.+):\n\s*REG:(\d+) STACK:(\d+)", part, re.M):
            short = re.sub(r"^void |\(.*\)$|\bfusednorm::cuda::", "", name)
            kernels[arch, short] = int(registers), int(stack)
    return architectures, kernels


def check_architectures(architectures, asked):
    """`asked` in the words of TORCH_CUDA_ARCH_LIST, where 9.0+PTX means both."""
    expected = {word for arch in asked for word in (arch, arch.removesuffix("+PTX"))}
    assert architectures == expected, f"asked for {sorted(expected)}, the library has {sorted(architectures)}"
    info = _hooks.build_info()
    assert info["cuda_architectures"] == asked, f"asked for {asked}, build_info() has {info['cuda_architectures']}"
    return f"machine code by nvcc {info['cuda']} for {', '.join(sorted(architectures))}"


def storage_type(name):
    first = re.search(r"<(?:[\w:]+<)*([\w:]+)", name)
    return TYPES.get(first[1], "other") if first else "other"


def report(kernels, every):
    """Prints the table and returns the kernels that may have no stack and do."""
    groups = defaultdict(list)
    for (arch, name), (registers, stack) in sorted(kernels.items()):
        groups[arch, storage_type(name)].append((registers, stack))
        if every:
            print(f"{arch:>5} {registers:4} registers {stack:5} stack  {name}")
    print(f"{'arch':>5} {'type':<9} {'kernels':>7}   {'min..max, median registers':<14} with stack (most bytes)")
    for (arch, kind), rows in groups.items():
        registers, stacks = sorted(r for r, _ in rows), [s for _, s in rows if s]
        spread = f"{registers[0]}..{registers[-1]}, {registers[len(rows) // 2]}"
        print(
            f"{arch:>5} {kind:<9} {len(rows):7}   {spread:<26} {len(stacks)}" + (f" ({max(stacks)})" if stacks else "")
        )
    return [f"{arch} {name}" for (arch, name), (_, s) in kernels.items() if s and storage_type(name) not in FORGIVEN]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", required=True, help='as in TORCH_CUDA_ARCH_LIST, "8.0 9.0+PTX"')
    parser.add_argument("--every", action="store_true", help="list every kernel")
    arguments = parser.parse_args()

    library = _library.ops_path
    torch.set_num_threads(min(2, torch.get_num_threads()))
    architectures, kernels = machine_code(library)
    assert kernels, f"{library} has no CUDA kernels"
    asked = arguments.architectures.replace(";", " ").split()
    print(f"{library}: {library.stat().st_size / 2**20:.1f} MiB, {len(kernels)} kernels, torch {torch.__version__}")
    for line in (check_registered(), check_fake(), check_cpu(), check_architectures(architectures, asked)):
        print(f"  {line}")
    spilling = report(kernels, arguments.every)
    if spilling:
        sys.exit(
            "These kernels keep locals in memory (spilled registers, or arrays indexed at run time):\n"
            + "\n".join(spilling)
        )


if __name__ == "__main__":
    main()
