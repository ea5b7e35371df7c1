"""Measures the peak memory of loading a 2 GB random checkpoint. Each backend runs in its own process.

    python benchmarks/load_memory.py [--folder FOLDER] [--json FILE]

The figure is the peak resident set of the whole process, including Python and the framework. It is read from the operating
system after the weights were loaded and one denoising step of a canvas of 8 tokens has used them. The bound is 1.15 times the
model's bytes in memory plus 400 MB. A BF16 file loaded in float32 shows that the model is never held twice.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import checkpoints
import torch

PROBE = """
import json, resource, sys
import numpy as np
from mlx_diffgemma.backends import Piece, Row, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
checkpoint = Checkpoint.open(sys.argv[1])
backend = load_backend(checkpoint, sys.argv[2], device="cpu", dtype=sys.argv[3])
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
cache, tokens = backend.new_cache(), np.arange(8, dtype=np.int32)
backend.encode([Piece(tokens, cache)])
backend.denoise([Row(tokens, cache, temperature=1.0)])
print(json.dumps({"load": loaded, "step": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="folder of the checkpoints, which are made if missing (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for stored in ("float32", "bfloat16"):
            folder = (arguments.folder or Path(temporary)) / stored
            checkpoints.write(folder, "2GB", getattr(torch, stored))
            stored_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            for backend in ("torch", "mlx"):
                probe = [sys.executable, "-c", PROBE, str(folder), backend, "float32"]
                peaks = json.loads(subprocess.run(probe, check=True, capture_output=True, text=True).stdout)
                size = stored_bytes * (1 if stored == "float32" else 2)
                bound = 1.15 * size + 400e6
                row = {
                    "backend": backend,
                    "stored": stored,
                    "in memory": "float32",
                    "file_GB": round(stored_bytes / 1e9, 3),
                    "model_GB": round(size / 1e9, 3),
                    "peak_after_load_GB": round(peaks["load"] / 1e9, 3),
                    "peak_after_step_GB": round(peaks["step"] / 1e9, 3),
                    "bound_GB": round(bound / 1e9, 3),
                    "within": peaks["step"] <= bound,
                }
                rows.append(row)
                print(row, flush=True)
    result = {
        "command": "python benchmarks/load_memory.py",
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not all(row["within"] for row in rows))


if __name__ == "__main__":
    main()
