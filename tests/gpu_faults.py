"""The measuring process of `make gpu` on the CPU with faults planted: `gpu_faults.py PLAN OPTIONS`, the options of
benchmarks/gpu_measure.py. PLAN has by row a contestant, a step and a fault."""

import dataclasses
import json
import os
import signal
import sys
import time

from benchmarks import case, gpu_clock, gpu_measure, gpu_rows, gpu_variants, measure


class Blind(gpu_clock.Dry):
    """Its tracer sees nothing."""

    def kernels(self, *runs):
        return [[] for _ in super().kernels(*runs)]


lost = []  # not empty: the context, and every call fails from then on


def strike(fault):
    if fault == "raises":
        raise RuntimeError("planted")
    if fault == "loses the context":
        gpu_clock.Dry.recover = lambda self: False
        lost.append(fault)
        raise RuntimeError("CUDA error: planted")
    if fault == "exits":
        os._exit(9)
    if fault == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hangs":
        time.sleep(600)


def main(plan, *arguments):
    plan = json.loads(plan)
    rows = [dataclasses.replace(gpu_rows.tiny(gpu_rows.MAIN)[0], name=name) for name in plan]
    gpu_rows.STAGES["main"], gpu_rows.tiny = rows, lambda rows: rows
    gpu_rows.PEERS["main"] = ("eager",)
    # The CPU has one choice of kernels, which will do for all.
    gpu_variants.set_residency = lambda name: True

    def plant(workload, who, step):
        planted = plan[workload.name]
        if lost:
            raise RuntimeError("CUDA error: lost before")
        if planted and planted[:2] == [who, step]:
            strike(planted[2])

    run, prepare, launches, memory_of = (
        measure.LayerTurn.run,
        case.Case._prepare,
        gpu_measure.launches,
        gpu_measure.memory_of,
    )

    def planted_run(turn):
        plant(turn.case.workload, turn.name, turn.mode)
        run(turn)

    def planted_prepare(self, provider):
        plant(self.workload, provider, "setup")
        prepare(self, provider)

    def planted_launches(clock, turn):
        workload = turn.case.workload
        plant(workload, turn.name, "profile")
        blind = plan[workload.name] == [turn.name, "profile", "traces nothing"]
        return launches(Blind() if blind else clock, turn)

    def planted_memory(case, turn):
        plant(case.workload, turn.name, "memory")
        return memory_of(case, turn)

    measure.LayerTurn.run, case.Case._prepare = planted_run, planted_prepare
    gpu_measure.launches, gpu_measure.memory_of = planted_launches, planted_memory
    return gpu_measure.main([*arguments, "--dry-run"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
