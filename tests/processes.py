"""Processes of tests that run cases together: started, waited for, and what each reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fusednorm


def start(code, *arguments):
    """A process that imports what this one does."""
    places = [str(Path(__file__).parent), str(Path(fusednorm.__file__).parents[1]), *filter(None, sys.path)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def reports(ranks, files, limit):
    """What the processes have written into `files`, one each, within `limit` seconds."""
    try:
        said = [process.communicate(timeout=limit)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    found = []
    for rank, (text, file) in enumerate(zip(said, files, strict=True)):
        assert file.exists(), f"rank {rank} ran no case:\n{text}"
        found.append(json.loads(file.read_text()))
    return found
