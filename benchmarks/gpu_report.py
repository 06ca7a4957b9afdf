"""The GPU's results for people: a table with the target beside each figure, and a picture. `python -P -m
benchmarks.gpu_report results.json [--png F]` shows an earlier run.

One unit is one pass over the activation at the bandwidth of a large copy, measured in the same run (bytes read and
written). Streaming kernels need 3 units forward and 5 backward; resident ones, which keep a channel on chip, 2 and 3;
an addition among them more (gpu_rows.floors).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import gpu_predicted, gpu_rows
from benchmarks.gpu_results import MODES
from benchmarks.gpu_rows import FLOOR, LARGE, SMALL, TARGETS

PEERS = gpu_rows.PEERS["main"]  # the other stages have some of them


def contestants(row: dict) -> list[str]:
    """In the order of their turns. One that failed has the modes before that, and a row that was cut short some."""
    return [name for name in dict.fromkeys(name for m in MODES for name in row["modes"].get(m, ())) if name != "copy_"]


def variants(row: dict) -> list[str]:
    return [name for name in contestants(row) if name not in PEERS]


def launches(row: dict, name: str, mode: str) -> list[dict] | None:
    """Of one profiled step; None where there was none, or its trace was empty. Of two variants that differ in saved
    bits alone one is profiled: the same kernels run."""
    plain = name.removesuffix("+bits")
    found = (row["launches"].get(each, {}).get(mode) for each in (name, plain, f"{plain}+bits"))
    return next(filter(None, found), None)


def kind(row: dict, variant: str, mode: str) -> str:
    """Which kernels ran, by their names: a channel that does not fit is streamed whatever was asked for."""
    modes = ("forward", "backward") if mode == "both" else (mode,)
    found = [launches(row, variant, m) for m in modes]
    if None in found:
        return "unknown"
    resident = [any("resident" in kernel["name"] for kernel in each) for each in found]
    return "resident" if all(resident) else "mixed" if any(resident) else "streaming"


def floor(row: dict, variant: str, mode: str) -> float | None:
    """None where it is unknown which kernels ran."""
    if kind(row, variant, mode) == "unknown":
        return None
    if mode == "both":
        return floor(row, variant, "forward") + floor(row, variant, "backward")
    return row["floor"][kind(row, variant, mode)][mode == "backward"]


def time_ms(row: dict, name: str, mode: str) -> float | None:
    return row["modes"].get(mode, {}).get(name, {}).get("median_ms")


def units(row: dict, name: str, mode: str, bandwidth: float) -> float | None:
    """Time of a contestant in passes over the tensor."""
    ms = time_ms(row, name, mode)
    return None if ms is None else ms * 1e-3 * bandwidth * 1e9 / row["unit_bytes"]


def gb_per_s(row: dict, variant: str, mode: str) -> float | None:
    ms, passes = time_ms(row, variant, mode), floor(row, variant, mode)
    return None if None in (ms, passes) else passes * row["unit_bytes"] / ms / 1e6


def of_copy(row: dict, variant: str, mode: str, bandwidth: float) -> float | None:
    speed = gb_per_s(row, variant, mode)
    return None if speed is None else speed / bandwidth


def ratio(row: dict, variant: str, mode: str, peer: str) -> float | None:
    ours, theirs = time_ms(row, variant, mode), time_ms(row, peer, mode)
    return None if None in (ours, theirs) else theirs / ours


def troubles(row: dict) -> list[str]:
    """What went wrong in a row, and which of its contestants failed where."""
    found = [f"FAILED: {row['failed']}"] if "failed" in row else ["unfinished"] if "running" in row else []
    found += [f"WRONG, {row['wrong']}"] if row.get("wrong") else []
    for who, steps in row["errors"].items():
        found += [f"{who} failed at {step}: {why}" for step, why in steps.items()]
    return found


def _has_target(row: dict) -> bool:
    return row["stage"] != "orders" and row["unit_bytes"] >= LARGE and row["act"] == "relu" and row["p"] == 0.1


def targets(row: dict, variant: str, bandwidth: float) -> list[dict]:
    """Every target of this row and variant: {"what", "value", "target", "met"}; `target` None: reported only, as where
    it is unknown which kernels ran."""
    if not _has_target(row):
        return []
    found = []

    def add(what, value, target, at_least=True):
        met = None if target is None or value is None else (value >= target if at_least else value <= target)
        found.append({"what": what, "value": value, "target": target, "met": met})

    for i, mode in enumerate(MODES[:2]):
        if kind(row, variant, mode) == "streaming":
            add(f"{mode} fraction of copy", of_copy(row, variant, mode, bandwidth), TARGETS.fraction)
        else:
            # Of 7x7 pictures several channels share a block, at a cost that is reported and has no limit.
            judged = kind(row, variant, mode) == "resident" and row["shape"][-1] != 7
            limit = TARGETS.units[i] if judged else None
            add(f"{mode} units", units(row, variant, mode, bandwidth), limit, at_least=False)
    both = kind(row, variant, "both")
    for peer, goals in (("eager", TARGETS.eager.get(row["dtype"], (None, None))), ("compile", TARGETS.compile)):
        goal = None if both == "unknown" else goals[both == "resident"]
        add(f"both vs {peer}", ratio(row, variant, "both", peer), goal)
    return found


# ---- text ------------------------------------------------------------------------------------------------------------
def _table(header: tuple, lines: list[tuple]) -> list[str]:
    cells = [tuple(str(c) for c in line) for line in (header, *lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    text = []
    for line in cells:
        left = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        text.append("  ".join(left).rstrip())
    return [text[0], "-" * len(text[0]), *text[1:]]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mark(found: list[dict], what: str, form: str) -> str:
    """The figure with its target: '0.91 (>=0.85 met)'."""
    for entry in found:
        if entry["what"] == what:
            if entry["target"] is None or entry["value"] is None:
                return _number(entry["value"], form)
            sign = "<=" if "units" in what else ">="
            return f"{entry['value']:{form}} ({sign}{entry['target']:g} {'met' if entry['met'] else 'MISSED'})"
    return ""


def _title(row: dict) -> str:
    act = row["act"][0] if isinstance(row["act"], list) else row["act"] or "no act"
    size = "x".join(map(str, row["shape"]))
    name = "" if row["workload"] == size else f"{row['workload']} "
    return f"{name}{size} {row['dtype']} {row['layout']} {act} p={row['p']:g}, {row['unit_bytes'] / 1e6:.1f} MB"


def row_text(row: dict, bandwidth: float, gpu) -> list[str]:
    text = [f"\n{_title(row)}", *(f"  {line}" for line in troubles(row))]
    if not row.get("modes"):
        return text
    lines = []
    for mode in MODES:
        for name in contestants(row):
            if time_ms(row, name, mode) is not None:
                lines.append((mode, *(_peer if name in PEERS else _variant)(row, name, mode, bandwidth)))
    header = ("mode", "who", "ms", "units", "floor", "GB/s", "of copy", "launches", "vs eager", "vs compile")
    text += ["  " + line for line in _table(header, lines)]
    for what, key, form in (("saved B/element", "saved_bytes_per_element", ".3f"), ("peak MB", "peak_mb", ".0f")):
        text.append(f"  {what}: " + ", ".join(f"{name} {_number(value, form)}" for name, value in row[key].items()))
    for variant in variants(row):
        work = [kernel for mode in MODES[:2] for kernel in row["launches"].get(variant, {}).get(mode, ())]
        if work:
            text.append(f"  kernels of {variant}, us: " + ", ".join(_kernel(row, kernel, gpu) for kernel in work))
    return text


def _count(row: dict, name: str, mode: str) -> str:
    found = launches(row, name, mode)
    return "-" if found is None else str(len(found))


def _peer(row: dict, name: str, mode: str, bandwidth: float) -> tuple:
    passes = f"{units(row, name, mode, bandwidth):.2f}"
    return name, f"{time_ms(row, name, mode):.4f}", passes, "", "", "", _count(row, name, mode), "", ""


def _variant(row: dict, name: str, mode: str, bandwidth: float) -> tuple:
    found = targets(row, name, bandwidth)
    return (
        f"{name} [{kind(row, name, mode)}]",
        f"{time_ms(row, name, mode):.4f}",
        _mark(found, f"{mode} units", ".2f") or f"{units(row, name, mode, bandwidth):.2f}",
        _number(floor(row, name, mode), "g"),
        _number(gb_per_s(row, name, mode), ".0f"),
        _mark(found, f"{mode} fraction of copy", ".3f") or _number(of_copy(row, name, mode, bandwidth), ".3f"),
        _count(row, name, mode),
        _mark(found, f"{mode} vs eager", ".2f") or _number(ratio(row, name, mode, "eager"), ".2f"),
        _mark(found, f"{mode} vs compile", ".2f") or _number(ratio(row, name, mode, "compile"), ".2f"),
    )


def _kernel(row: dict, kernel: dict, gpu) -> str:
    predicted = gpu_predicted.predicted_us(row["label"], kernel["name"], gpu)
    beside = "" if predicted is None else f" (predicted {predicted:.1f})"
    return f"{gpu_predicted.short(kernel['name'])} {kernel['us']:.1f}{beside}"


def small_text(rows: list[dict]) -> list[str]:
    """Layers under a megabyte: per step in a CUDA graph, and host time without one; eager's must not be less."""
    by_row = {}
    for row in rows:
        by_row.setdefault(_title(row), {})[row["provider"]] = row
    text = ["\nSmall layers (us per step; in a CUDA graph: no slower than eager; host time: less than eager)"]
    lines = []
    for title, found in by_row.items():
        for mode in ("forward", "both"):
            for what in ("graph_us", "host_us"):
                values = {name: found.get(name, {}).get(what, {}).get(mode) for name in ("eager", "compile", "fused")}
                verdict = ""
                if None not in (values["eager"], values["fused"]):
                    verdict = "met" if values["fused"] <= values["eager"] else "MISSED"
                lines.append((title, f"{mode} {what[:-3]}", *(_number(v, ".1f") for v in values.values()), verdict))
        counts = {
            name: found.get(name, {}).get("launches", {}).get("both", "-") for name in ("eager", "compile", "fused")
        }
        lines.append((title, "both launches", *counts.values(), ""))
    text += ["  " + line for line in _table(("layer", "what", "eager", "compile", "fused", "target"), lines)]
    text += [f"  failed: {row['key']}: {row['failed']}" for row in rows if "failed" in row]
    return text


def verdicts(data: dict) -> list[str]:
    """The targets in one place: how many are met by the best of the choices, and which are missed."""
    bandwidth = data["copy"]["bandwidth"]["gb_per_s"]
    met, missed, rows = 0, [], 0
    for row in data["rows"]:
        if "failed" in row or not row.get("modes") or not _has_target(row):
            continue
        rows += 1
        for variant in ("fused", "streaming"):
            for entry in targets(row, variant, bandwidth):
                if entry["met"] is None:
                    continue
                met += entry["met"]
                if not entry["met"]:
                    missed.append(
                        f"{_title(row)} {variant}: {entry['what']} {entry['value']:.2f}, target {entry['target']:g}"
                    )
    small = {}
    for row in data["small"]:
        if row["unit_bytes"] <= SMALL and "failed" not in row:
            small.setdefault(_title(row), {})[row["provider"]] = row
    for title, found in small.items():
        if not {"eager", "fused"} <= set(found):
            continue
        for what in ("graph_us", "host_us"):
            ours, theirs = found["fused"][what]["both"], found["eager"][what]["both"]
            met += ours <= theirs
            if ours > theirs:
                missed.append(f"{title}: {what[:-3]} {ours:.1f} us, eager's {theirs:.1f}")
    failed = [f"{row['key']}: {'; '.join(found)}" for row in data["rows"] + data["small"] if (found := troubles(row))]
    text = [f"\nTargets: {met} of {met + len(missed)} met, over {rows} large rows and {len(small)} small ones."]
    text += [f"  missed: {line}" for line in missed]
    text += [f"  failed: {name}" for name in failed]
    text += [f"  {n} rows of stage {stage!r} not reached" for stage, n in data.get("not reached", {}).items() if n]
    return text


def brief(data: dict) -> list[str]:
    """One line per row: the product as shipped, forward + backward."""
    bandwidth = data["copy"]["bandwidth"]["gb_per_s"]
    lines = []
    for row in data["rows"]:
        if not row.get("modes"):
            lines.append((_title(row), "failed" if "failed" in row else "unfinished", *[""] * 6))
            continue
        passes = [
            f"{_number(units(row, 'fused', mode, bandwidth), '.2f')}/{_number(floor(row, 'fused', mode), 'g')}"
            for mode in MODES[:2]
        ]
        lines.append(
            (
                _title(row),
                kind(row, "fused", "both"),
                _number(time_ms(row, "fused", "both"), ".4f"),
                *passes,
                _number(of_copy(row, "fused", "both", bandwidth), ".3f"),
                _number(ratio(row, "fused", "both", "eager"), ".2f"),
                _number(ratio(row, "fused", "both", "compile"), ".2f"),
            )
        )
    header = ("layer", "kernels", "ms", "fwd units/floor", "bwd units/floor", "of copy", "vs eager", "vs compile")
    return ["\nForward + backward of the layer as shipped", *_table(header, lines)]


def machine_text(data: dict) -> list[str]:
    facts = data["machine"]
    names = ("gpu", "driver", "gpu_state", "cuda", "torch", "python", "cpu", "commit", "date")
    bandwidth = data["copy"]["bandwidth"]
    return [
        ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name)),
        f"copy of {bandwidth['bytes'] / 1e9:.2f} GB: {bandwidth['gb_per_s']:.0f} GB/s read and written",
        "switches of the library: " + ", ".join(f"{k} {'yes' if v else 'no'}" for k, v in data["switches"].items()),
    ]


def text(data: dict) -> str:
    lines = machine_text(data) + gpu_predicted.summary(data)
    if data["rows"]:
        lines += brief(data)
    lines += verdicts(data)
    if data["small"]:
        lines += small_text(data["small"])
    for row in data["rows"]:
        lines += row_text(row, data["copy"]["bandwidth"]["gb_per_s"], gpu_predicted.gpu_of(data["machine"]))
    return "\n".join(lines) + "\n"


# ---- picture ---------------------------------------------------------------------------------------------------------
def draw(data: dict, path: Path) -> None:
    from benchmarks import plot

    plt = plot.plt
    bandwidth = data["copy"]["bandwidth"]["gb_per_s"]
    rows = [row for row in data["rows"] if row.get("modes")]
    if not rows:
        return
    figure, axes = plt.subplots(1, 3, figsize=(19, 1.6 + 0.5 * len(rows)), layout="constrained", sharey=True)

    def speed(row, name):
        return ratio(row, name, "both", "eager")

    ours = ("compile", "streaming", "resident", "fused")
    plot._groups(axes[0], rows, ours, speed, "{:.2f}x", title=_title)
    axes[0].axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes[0].set_xlabel("forward + backward: eager's time / this one")
    for axis, mode in zip(axes[1:], MODES[:2], strict=True):

        def passes(row, name, mode=mode):
            return units(row, name, mode, bandwidth)

        plot._groups(axis, rows, ("eager", *ours), passes, "{:.1f}", title=_title)
        for name in FLOOR:
            axis.axvline(FLOOR[name][mode == "backward"], color=plot.COLOURS[name], linewidth=0.8, linestyle=":")
        axis.set_xlabel(f"{mode}: passes over the tensor at copy bandwidth (dotted: the floors)")
    axes[0].invert_yaxis()  # shared: each panel turned it once
    if axes[0].get_ylim()[0] < axes[0].get_ylim()[1]:
        axes[0].invert_yaxis()
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    facts = data["machine"]
    figure.suptitle(f"{facts['gpu']}, torch {facts['torch']}, copy {bandwidth:.0f} GB/s", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Shows the results of a run on a GPU.")
    parser.add_argument("json", type=Path)
    parser.add_argument("--png", type=Path, help="draw them too")
    args = parser.parse_args(arguments)
    data = json.loads(args.json.read_text())
    print(text(data), end="")
    if args.png:
        draw(data, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
