"""Converts a checkpoint of the released layout, and reports peak memory, time and size.

The source has the released checkpoint's names, shapes and dtypes, but its shards are sparse files: 51.6 GB that take no disk and
read as zeros. The output takes real disk: 16.6 GB with the default recipe, which is 0.5 GB per layer plus 2 GB. Reading a sparse
file costs less than reading a disk. Packing zeros costs as much as packing other numbers.

    python benchmarks/convert_real.py FOLDER [--layers 30] [--recipe 4bit] [--json FILE]
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from math import prod
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from mlx_diffgemma.reports.speed import Machine  # noqa: E402
from support.real_layout import LAYERS, config, stored_tensors  # noqa: E402

SHARD_BYTES = 5_000_000_000


def write_source(folder: Path, layers: int) -> int:
    """Write the sparse checkpoint. Returns the size of its tensors in bytes."""
    folder.mkdir(parents=True)
    settings = config()
    text = settings["text_config"]
    text["num_hidden_layers"], text["layer_types"] = layers, text["layer_types"][:layers]
    (folder / "config.json").write_text(json.dumps(settings))
    absent = tuple(f".{part}.layers.{n}." for part in ("decoder", "language_model") for n in range(layers, LAYERS))
    shards: list[dict[str, tuple[int, ...]]] = []
    room = total = 0
    for name, (shape, _) in stored_tensors("weights.tsv").items():
        if any(part in name for part in absent):
            continue
        nbytes = 2 * prod(shape)
        if nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= nbytes
        total += nbytes
    for index, shard in enumerate(shards):
        write_hole(folder / f"model-{index:05}.safetensors", shard.items())
    return total


def write_hole(path: Path, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Write a sparse safetensors file of BF16 zeros, which takes no disk."""
    table, end = {}, 0
    for name, shape in tensors:
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + 2 * prod(shape))}
        end += 2 * prod(shape)
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder for source/ and target/; must not exist")
    parser.add_argument("--layers", type=int, default=LAYERS, help="number of layers (default %(default)s)")
    parser.add_argument("--recipe", default="4bit", help="recipe of the conversion (default %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    source, target = options.folder / "source", options.folder / "target"
    nbytes = write_source(source, options.layers)
    command = "from mlx_diffgemma.cli.convert import convert; convert()"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", command, str(source), str(target), "--recipe", options.recipe], check=True)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    result = {
        "command": f"python benchmarks/convert_real.py FOLDER --layers {options.layers} --recipe {options.recipe}",
        "machine": dataclasses.asdict(Machine.this()),
        "load_average": os.getloadavg(),
        "source_bytes": nbytes,
        "written_bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
        "seconds": round(seconds, 1),
        "source_MB_per_second": round(nbytes / seconds / 1e6, 1),
        "peak_rss_bytes": peak,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
