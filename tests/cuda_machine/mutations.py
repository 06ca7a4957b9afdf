"""Bugs to plant in csrc/cuda/device.cuh, the one file that tests/cuda_host replaces and so cannot see.

A few kernels are compiled with each: those of a default forward and backward in bfloat16, eight values at a time.
"""

from dataclasses import dataclass

from cuda_host.compiling import copy_kernels, plant

FORWARD = ("channels_first_statistics", "channels_first_apply", "channels_first_resident_forward")
BACKWARD = ("channels_first_gradient_sums", "channels_first_input_gradient", "channels_first_resident_backward")
DIFFERS = r"^layer |differs from that in the order"  # a result that is not right, or not the same whatever runs first


@dataclass(frozen=True)
class Mutation:
    name: str
    old: str
    new: str
    says: str  # a pattern; "": nothing

    def planted(self, room):
        """A source file with the bug in it."""
        copy_kernels(room)
        if self.old:
            plant(room / "cuda" / "device.cuh", self.old, self.new)
        lines = ['#include "channels_first_resident.cuh"', "namespace fusednorm::cuda {"]
        for names, arguments in ((FORWARD, "ForwardArguments"), (BACKWARD, "BackwardArguments")):
            lines += [f"template __global__ void {name}<BFloat16, 8>({arguments}<BFloat16>);" for name in names]
        source = room / "cuda" / "mutated.cu"
        source.write_text("\n".join([*lines, "}", ""]))
        return source


MUTATIONS = [
    Mutation("nothing", "", "", ""),
    Mutation("peer_of_one_rank", '"r"(rank));', '"r"(0));', DIFFERS),
    Mutation("peer_beyond_the_cluster", '"r"(rank));', '"r"(rank + 1));', "block that is not in the cluster"),
    Mutation("no_cluster_barrier", "barrier.cluster.arrive;\\nbarrier.cluster.wait;", "", "has ended|" + DIFFERS),
    Mutation(
        "store_of_half_a_pack",
        '"st.global.v4.b32 [%0], {%1, %2, %3, %4};"',
        '"st.global.v2.b32 [%0], {%1, %2};"',
        DIFFERS,
    ),
    Mutation("misaligned_shared_memory", "bytes + offset", "bytes + offset + 8", "is not aligned"),
    Mutation("beyond_shared_memory", "bytes + offset", "bytes + offset + (1 << 16)", "outside of shared memory"),
    Mutation(
        "halves_swapped",
        "half ? word & 0xffff0000u : word << 16",
        "half ? word << 16 : word & 0xffff0000u",
        DIFFERS,
    ),
    Mutation(
        "halves_narrowed_in_the_other_order",
        "__floats2bfloat162_rn(low, high)",
        "__floats2bfloat162_rn(high, low)",
        DIFFERS,
    ),
    Mutation(
        "shuffle_to_another_lane",
        "__shfl_xor_sync(0xffffffffu, value, mask)",
        "__shfl_sync(0xffffffffu, value, mask)",
        DIFFERS,
    ),
    Mutation("lower_half", "__umulhi(a, b)", "a * b", DIFFERS + "|is outside of all tensors"),
]
