"""Runs code in a process of its own, whose peak of memory counts that code only. Linux, which can begin the peak anew."""

import os
import subprocess
import sys
from pathlib import Path

#: What the code may call: ``measured(work)`` is what ``work()`` returns, by how many MiB it raised the peak, and its seconds.
_MEASURED = """
import time
from pathlib import Path

def _peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

def measured(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = _peak(), time.perf_counter()
    result = work()
    return result, _peak() - before, time.perf_counter() - start
"""


def run_alone(code: str) -> str:
    """What the code prints. It can import from tests/, and call ``measured``."""
    tests = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", _MEASURED + code]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": paths}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
