"""DDP, FSDP2, distributed checkpoints and DTensors over two gloo processes: as with the stock layers.

One pair of processes runs all cases of a group (distributed_cases.py), and each case is a test here.
"""

import functools

import distributed_cases
import pytest
import torch
import torch.distributed as dist
from processes import reports, start

pytestmark = [
    pytest.mark.slow,  # whichever of a group's tests comes first runs the group
    pytest.mark.cpu,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"),
]

LIMIT = 300  # seconds; each case has a limit of its own for what waits


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Group -> (folder, what each rank reports)."""

    @functools.cache
    def run(group):
        folder = tmp_path_factory.mktemp(group)
        code = "import sys, distributed_cases as cases; cases.main(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
        ranks = [start(code, group, str(rank), str(folder)) for rank in range(distributed_cases.WORLD_SIZE)]
        files = [folder / f"{group}-{rank}.json" for rank in range(distributed_cases.WORLD_SIZE)]
        return folder, reports(ranks, files, LIMIT)

    return run


@pytest.mark.parametrize(
    ("group", "case"), [(group, case) for group, cases in distributed_cases.groups().items() for case in cases]
)
def test_case(ran, group, case):
    for rank, errors in enumerate(ran(group)[1]):
        assert case in errors, f"rank {rank} ended before this case"
        assert errors[case] is None, f"rank {rank}: {errors[case]}"


@pytest.mark.parametrize("source", ["fused", "stock"])
@pytest.mark.parametrize("target", ["fused", "stock"])
def test_one_process_loads_what_two_have_saved(ran, source, target):
    import torch.distributed.checkpoint as dcp

    folder, _ = ran("fsdp")
    expected = torch.load(folder / f"{source}-of_model.pt")
    model = getattr(distributed_cases, target)(0.4, seed=12)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / f"{source}-of_model", no_dist=True)
    model.load_state_dict(state["model"])
    distributed_cases.agree(model.state_dict(), expected, rtol=0, atol=0)


IMPORTS = {
    "torch's first": "import torch.distributed.tensor, fusednorm",
    "ours first": "import fusednorm, torch.distributed.tensor",
}
ONE_PROCESS = """
import sys, torch
{imports}
import torch.distributed as dist
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
layer = distribute_module(fusednorm.FusedBatchNorm1d(3, act="relu", drop=0.4), mesh)
y = layer(distribute_tensor(torch.randn(8, 3), mesh, [Replicate()]))
print(*y.placements)
"""


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS.keys())
def test_rules_are_there_in_either_order_of_imports(imports):
    process = start(ONE_PROCESS.format(imports=imports))
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and text.splitlines()[-1] == "R", text
