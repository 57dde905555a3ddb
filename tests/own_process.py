"""A test file run as a program: a process in which nothing ran before, to measure its memory."""

import json
import os
import subprocess
import sys
from pathlib import Path


def output_of(file: str) -> dict:
    """The JSON that the file prints.

    In its process freed blocks go back to the system: the process's size is what tensors hold.
    """
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
