"""The census: which layers real models run, as rows for the benchmark. `make census` runs it and writes census.json.

One training-mode forward of each public model of `census_models.py`, with random weights; `census_record.py` reads the
chains off it. Chains alike in shape, layout, order, activation and granularity are one kind, with the drop probability
and the in-place stages that most of them have. Of all kinds about 260 become rows:

- none whose activation has more than 200 MB as float32, and none with one value per channel;
- kinds are ranked within their field, which is an order, an activation, a layout and a class of pixels per channel: by
  the number of models that have them, then by the number of calls, then by name;
- a field has a share of the rows that goes with the square root of its calls: what is common has most, and nearly every
  order and activation at every size is there.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (found through the line above, as is what follows)
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from benchmarks.census_classes import pixel_class  # noqa: E402
from benchmarks.census_record import Chain, Recorder  # noqa: E402

FILE = Path(__file__).with_name("census.json")
ROWS = 260
LARGEST = 200e6  # bytes of one float32 activation
NAMED = 3  # models per row


def _forward(model: Callable, inputs: tuple) -> list[Chain]:
    if isinstance(model, torch.nn.Module):
        model.train()
    arguments = [torch.randn(given) if isinstance(given, tuple) else given() for given in inputs]
    with Recorder() as recorder:
        model(*arguments)
    return recorder.chains()


def chains_of(build: Callable[[], Callable], inputs: tuple) -> list[Chain]:
    """By shapes alone where the model allows, else by a real forward of a new one, as the first may have kept what has
    no values. The model is made of real tensors in any case: copies of fake ones, as many make of their layers, are not
    safe."""
    model = build()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _forward(model, inputs)
    except Exception:
        return _forward(build(), inputs)


def kinds(found: Iterable[tuple[str, Chain]]) -> list[dict]:
    """The chains of all models, alike ones in one entry."""
    alike = collections.defaultdict(list)
    for model, chain in found:
        alike[chain.shape, chain.layout, chain.order, chain.act, chain.granularity].append((model, chain))
    entries = []
    for (shape, layout, order, act, granularity), members in alike.items():
        usual = collections.Counter((chain.p, chain.inplace) for _, chain in members)
        (p, inplace), _ = min(usual.items(), key=lambda item: (-item[1], item[0]))
        models = collections.Counter(model for model, _ in members)
        entry = {"shape": list(shape), "layout": layout, "order": order, "act": list(act) if act else None, "p": p}
        entry |= {"granularity": granularity, "inplace": list(inplace)}
        names = sorted(models, key=lambda name: (-models[name], name))
        entries.append(entry | {"models": names, "count": len(members)})
    return entries


def thinned(entries: list[dict], rows: int = ROWS) -> list[dict]:
    """At most `rows` of them, by the rule above, sorted."""
    fields, taken = collections.defaultdict(list), collections.Counter()
    for entry in entries:
        size, channels = math.prod(entry["shape"]), entry["shape"][1]
        if 4 * size <= LARGEST and size > channels:
            fields[entry["order"], str(entry["act"]), entry["layout"], pixel_class(entry["shape"])].append(entry)
    for members in fields.values():
        members.sort(key=lambda entry: (-len(entry["models"]), -entry["count"], _by_name(entry)))
    weight = {key: math.sqrt(sum(entry["count"] for entry in members)) for key, members in fields.items()}
    picked = []
    while len(picked) < rows and fields:  # to whom the next row brings nearest to its share, as with seats and votes
        key = max(fields, key=lambda key: (weight[key] / (1 + 2 * taken[key]), key))
        picked.append(fields[key][taken[key]])
        taken[key] += 1
        if taken[key] == len(fields[key]):
            del fields[key]
    return sorted((entry | {"models": entry["models"][:NAMED]} for entry in picked), key=_by_name)


def _by_name(entry: dict) -> tuple:
    return len(entry["shape"]), entry["shape"], entry["layout"], entry["order"], str(entry["act"]), entry["granularity"]


def _written(entries: list[dict]) -> str:
    return "[\n" + ",\n".join(f" {json.dumps(entry)}" for entry in entries) + "\n]\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Count the BatchNorms of public models and what stands around them.")
    parser.add_argument("--out", metavar="F", type=Path, default=FILE, help="where to write the rows")
    parser.add_argument("--rows", type=int, default=ROWS, help="how many to keep")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)  # a model that cannot run by shapes alone says so at length

    from benchmarks.census_models import SOURCES
    from benchmarks.census_packages import stand_in

    stand_in()
    torch.manual_seed(0)
    found, left_out, models = [], [], 0
    for source in SOURCES:
        try:
            for name, build, inputs in source():
                try:
                    chains = chains_of(build, inputs)
                except Exception as error:
                    left_out.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
                    continue
                models += 1
                found += [(name, chain) for chain in chains]
                print(f"  {name}: {len(chains)}", flush=True)
        except ImportError as error:
            left_out.append(f"{source.__name__.strip('_')}: {error}")
    entries = kinds(found)
    picked = thinned(entries, args.rows)
    args.out.write_text(_written(picked))
    in_place = [chain for _, chain in found if "act" in chain.order and "act" in chain.inplace]
    with_act = [chain for _, chain in found if "act" in chain.order]
    print(f"{models} models, {len(found)} norms of {len(entries)} kinds, {len(picked)} rows in {args.out}")
    print(f"{len(in_place)} of {len(with_act)} activations are in place")
    for line in left_out:
        print(f"  left out: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
