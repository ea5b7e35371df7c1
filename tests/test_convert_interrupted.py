"""Conversions that end early: killed, interrupted, out of disk. None leaves a target, and each can resume to the same bytes."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.convert import Plan, make_recipe, shards, side_files, work, write
from mlx_diffgemma.errors import CheckpointError, InputError
from support.converting import LARGE, contents, converted, copy_with, make_source, refused, run

SHARD_BYTES = 60_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("bf16"))


_CHILD = """
import json, os, signal, sys
from pathlib import Path
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.convert import Plan, make_recipe, side_files, write

source, target, deadly, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
events, reports = 0, []

def tick():
    global events
    events += 1
    if events == deadly:
        os.kill(os.getpid(), signal.SIGKILL)

def audit(event, arguments):  # is called before the operation
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(arguments[0]).startswith(str(target)):
        tick()

def report(progress):
    tick()
    reports.append((events, progress.bytes_done))

checkpoint = Checkpoint.open(source)
plan = Plan.make(checkpoint, make_recipe(), shard_bytes)
files = side_files(checkpoint, plan)
sys.addaudithook(audit)
write(plan, target, files, report=report)
print(json.dumps([events, reports]))
"""


def killed_run(source: Path, target: Path, deadly: int) -> subprocess.CompletedProcess[str]:
    """Convert in a process that kills itself at the ``deadly``-th piece or file operation; 0 means never.

    The process prints the number of these, and for each report its number and the bytes written.
    """
    command = [sys.executable, "-c", _CHILD, str(source), str(target), str(deadly), str(SHARD_BYTES)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Kill it between two files, between two tensors, and between two pieces of one tensor."""
    source = make_source(tmp_path / "source", LARGE)
    expected = contents(converted(source, tmp_path / "expected", "--shard-size", str(SHARD_BYTES)))
    whole = killed_run(source, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    assert contents(tmp_path / "whole") == expected
    events, reports = json.loads(whole.stdout)
    ends = {0, *accumulate(entry.nbytes for entry in Plan.make(Checkpoint.open(source), make_recipe(), SHARD_BYTES).entries)}
    within = [event for event, nbytes in reports if nbytes not in ends]
    assert len(within) >= 3, "every tensor is written in one piece"
    # the first and the last operation create and rename the folder
    points = sorted({2, within[0], within[-1], *random.Random(0).sample(range(3, events - 3), 6), events - 3, events - 1})
    for point in points:
        target = tmp_path / f"killed at {point}"
        killed = killed_run(source, target, point)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        partial = tmp_path / f"{target.name}.partial"
        kept = {file.name: file.stat().st_ino for file in partial.glob("model/*.safetensors")}
        print(f"killed at {point} of {events}: {len(kept)} shards finished, target {'there' if target.exists() else 'absent'}")
        if target.exists():  # renamed; only the empty working folder is left
            assert not kept
        else:
            converted(source, target, "--shard-size", str(SHARD_BYTES))
            assert {name: (target / name).stat().st_ino for name in kept} == kept, "a finished shard was written again"
            assert not partial.exists()
        assert contents(target) == expected


def stop_after(shards_done: int) -> shards.Report:
    def report(progress: shards.Progress) -> None:
        if progress.shards_done == shards_done:
            raise KeyboardInterrupt

    return report


def interrupted(source: Path, target: Path, shards_done: int = 2) -> None:
    checkpoint = Checkpoint.open(source)
    plan = Plan.make(checkpoint, make_recipe(), SHARD_BYTES)
    with pytest.raises(KeyboardInterrupt):
        write(plan, target, side_files(checkpoint, plan), report=stop_after(shards_done))
    assert not target.exists()
    assert len(list(target.with_name(f"{target.name}.partial").glob("model/*.safetensors"))) == shards_done


@pytest.mark.parametrize("change", ["recipe", "shards", "source"])
def test_an_unfinished_run_of_another_plan_is_refused(change: str, source: Path, tmp_path: Path) -> None:
    copy, target = copy_with(source, tmp_path / "copy"), tmp_path / "out"
    interrupted(copy, target)
    options = {
        "recipe": ["--recipe=8bit", f"--shard-size={SHARD_BYTES}"],
        "shards": ["--shard-size=70KB"],
        "source": [f"--shard-size={SHARD_BYTES}"],
    }[change]
    if change == "source":
        os.utime(copy / "model.safetensors", (1, 1))
    refused(run(copy, target, *options), InputError, "another source or with other settings; finish that one, or discard")
    assert contents(converted(copy, target, *options, "--restart")) == contents(converted(copy, tmp_path / "new", *options))
    assert not list(tmp_path.glob("*.partial"))


def test_only_finished_shards_are_kept(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out")
    model = tmp_path / "out.partial" / "model"
    strays = ("model-00003-of-00009.safetensors.unfinished", "special_tokens_map.json", ".DS_Store", "model-9.safetensors")
    for name in strays:
        (model / name).touch()
    (model / "folder").mkdir()
    (model / "link.safetensors").symlink_to(source / "model.safetensors")
    options = f"--shard-size={SHARD_BYTES}"
    assert contents(converted(source, tmp_path / "out", options)) == contents(converted(source, tmp_path / "whole", options))


def test_progress_counts_what_an_earlier_run_wrote(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out", 3)
    result = run(source, tmp_path / "out", f"--shard-size={SHARD_BYTES}")
    plan = Plan.make(Checkpoint.open(source), make_recipe(), SHARD_BYTES)
    done = [sum(shard.nbytes for shard in plan.shards[:count]) for count in range(len(plan.shards) + 1)]
    expected = [f"shard {n} of {len(plan.shards)}: {done[n]:,} of {plan.nbytes:,} bytes" for n in range(3, len(done))]
    assert result.stderr.splitlines()[:-1] == expected


def test_two_runs_do_not_share_a_target(source: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(source)
    plan = Plan.make(checkpoint, make_recipe(), SHARD_BYTES)
    second: list[Result] = []

    def report(progress: shards.Progress) -> None:
        if not second:
            second.append(run(source, tmp_path / "out", f"--shard-size={SHARD_BYTES}"))

    write(plan, tmp_path / "out", side_files(checkpoint, plan), report=report)
    refused(second[0], InputError, "another conversion to this target is running")
    assert Checkpoint.open(tmp_path / "out").quantization


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EFBIG, "File too large")])
def test_a_disk_that_fills_up(code: int, message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write beyond a budget fails with the operating system's error."""
    budget = 200_000

    class Limited(io.BufferedWriter):
        def write(self, data: Any) -> int:
            nonlocal budget
            budget -= memoryview(data).nbytes
            if budget < 0:
                raise OSError(code, os.strerror(code))
            return super().write(data)

    def limited_open(path: Path, mode: str) -> Any:
        return Limited(io.FileIO(path, "x")) if mode == "xb" else open(path, mode)

    monkeypatch.setattr(work, "open", limited_open, raising=False)
    options = f"--shard-size={SHARD_BYTES}"
    refused(run(source, tmp_path / "out", options), CheckpointError, message)
    finished = list((tmp_path / "out.partial" / "model").glob("*.safetensors"))
    assert not (tmp_path / "out").exists()
    assert len(finished) == 3, finished
    budget = 10**9
    assert contents(converted(source, tmp_path / "out", options)) == contents(converted(source, tmp_path / "whole", options))


def test_a_disk_that_is_too_small_is_known_beforehand(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.make(Checkpoint.open(source), make_recipe(), SHARD_BYTES)
    files = sum(map(len, side_files(Checkpoint.open(source), plan).values()))
    options = f"--shard-size={SHARD_BYTES}"
    usage = type("Usage", (), {})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    usage.free = plan.nbytes + files - 1
    refused(run(source, tmp_path / "out", options), CheckpointError, "of disk, but")
    assert not list(tmp_path.rglob("*.safetensors*"))
    usage.free = plan.nbytes + files
    interrupted(source, tmp_path / "out", 2)
    usage.free -= sum(shard.nbytes for shard in plan.shards[:2])  # these shards are already written
    converted(source, tmp_path / "out", options)


# --- damage between two runs ---


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def swap(file: Path) -> None:
    other = next(each for each in sorted(file.parent.glob("*.safetensors")) if each != file)
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


def replace_by_link(file: Path) -> None:
    file.rename(file.parents[2] / "elsewhere")
    file.symlink_to(file.parents[2] / "elsewhere")


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "note").touch()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "the first byte": lambda file: flip(file, 0),
    "a byte of the header": lambda file: flip(file, 40),
    "a byte of a tensor": lambda file: flip(file, file.stat().st_size // 2),
    "the last byte": lambda file: flip(file, -1),
    "cut off": lambda file: os.truncate(file, file.stat().st_size - 1),
    "emptied": lambda file: os.truncate(file, 0),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 1),
    "removed": lambda file: file.unlink(),
    "swapped": swap,
    "replaced by a link": replace_by_link,
    "replaced by a pipe": replace_by_pipe,
    "replaced by a folder": replace_by_folder,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_written_again(damage: str, source: Path, tmp_path: Path) -> None:
    options = f"--shard-size={SHARD_BYTES}"
    interrupted(source, tmp_path / "out", 3)
    first, second, third = sorted((tmp_path / "out.partial" / "model").glob("*.safetensors"))
    kept = {third.name} | ({second.name} if damage != "swapped" else set())
    DAMAGE[damage](first)
    marked(third.parent, kept)
    target = converted(source, tmp_path / "out", options)
    assert contents(target) == contents(converted(source, tmp_path / "whole", options))
    assert all(file.is_file() and not file.is_symlink() for file in target.iterdir())
    assert unwritten(target) == kept, "exactly the undamaged shards are kept"


def marked(folder: Path, names: Iterable[str]) -> None:
    """Mark files so that :func:`unwritten` knows them again."""
    for name in names:
        os.utime(folder / name, (1, 1))


def unwritten(folder: Path) -> set[str]:
    """The marked files that were not written since."""
    return {file.name for file in folder.iterdir() if file.stat().st_mtime == 1}


def test_a_damaged_record(source: Path, tmp_path: Path) -> None:
    options = f"--shard-size={SHARD_BYTES}"
    interrupted(source, tmp_path / "out", 2)
    record = tmp_path / "out.partial" / "record.json"
    good = record.read_text()
    for bad in ("", "[]", good[:-9], good.replace("shards", "shard"), good.replace("[", "{"), "\xff", "[" * 100_000, "0" * 64):
        record.write_text(bad, encoding="latin-1")
        refused(run(source, tmp_path / "out", options), InputError, "record.json: damaged, so the unfinished conversion cannot")
    assert not (tmp_path / "out").exists()

    content = json.loads(good)
    first, second = sorted(content["shards"])
    content["shards"][first][1] = content["shards"][second][1]
    content["shards"][second][0] += 1
    record.write_text(json.dumps(content))
    marked(record.parent / "model", (first, second))
    expected = contents(converted(source, tmp_path / "whole", options))
    assert contents(converted(source, tmp_path / "out", options)) == expected
    assert not unwritten(tmp_path / "out")

    interrupted(source, tmp_path / "out2", 2)
    (tmp_path / "out2.partial" / "record.json").write_text("")
    assert contents(converted(source, tmp_path / "out2", options, "--restart")) == expected


# --- sources that are damaged, or change ---


def rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda header: header) -> None:
    """Write a safetensors file again, with another header."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


CHANGES: dict[str, Callable[[Path], object]] = {
    "touched": lambda folder: os.utime(folder / "model.safetensors", (1, 1)),
    "longer": lambda folder: os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size + 8),
    "another tokenizer": lambda folder: (folder / "tokenizer.json").write_text("other"),
    "another configuration": lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text() + " "),
    "the same file again": lambda folder: rewrite(folder / "model.safetensors"),
}


@pytest.mark.parametrize("when", [1, 3, 9])
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_meanwhile(change: str, when: int, source: Path, tmp_path: Path) -> None:
    copy = copy_with(source, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("the content")
    checkpoint = Checkpoint.open(copy)
    plan = Plan.make(checkpoint, make_recipe(), SHARD_BYTES)
    done = 0

    def report(progress: shards.Progress) -> None:
        nonlocal done
        if progress.shards_done == when > done:
            CHANGES[change](copy)
        done = progress.shards_done

    assert len(plan.shards) == 9
    with pytest.raises(CheckpointError, match=r"changed while it was (converted|read)"):
        write(plan, tmp_path / "out", side_files(checkpoint, plan), report=report)
    assert not (tmp_path / "out").exists()
    assert len(json.loads((tmp_path / "out.partial" / "record.json").read_text())["shards"]) == when
    if change != "longer":  # a file that is longer than its header says is refused
        options = f"--shard-size={SHARD_BYTES}"
        refused(run(copy, tmp_path / "out", options), InputError, "another source or with other settings")
        assert contents(converted(copy, tmp_path / "out", options, "--restart")) == contents(
            converted(copy, tmp_path / "whole", options)
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda header: {},
        lambda header: {name: {**entry, "dtype": "F16"} for name, entry in header.items()},
        lambda header: {name: {**entry, "data_offsets": [0, 2]} for name, entry in header.items()},
        lambda header: {name: {"shape": entry.get("shape")} for name, entry in header.items()},
        lambda header: {name: 5 for name in header},
        list,
    ],
)
def test_a_source_that_is_replaced_under_the_reader(change: Callable[[Any], Any], source: Path, tmp_path: Path) -> None:
    copy = copy_with(source, tmp_path / "copy")
    checkpoint = Checkpoint.open(copy)
    plan = Plan.make(checkpoint, make_recipe())
    rewrite(copy / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read"):
        write(plan, tmp_path / "out", side_files(checkpoint, plan))
    (copy / "model.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read"):
        write(plan, tmp_path / "out", side_files(checkpoint, plan), restart=True)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"):
        write(plan, tmp_path / "out", side_files(checkpoint, plan), restart=True)
    assert not (tmp_path / "out").exists()


def test_a_source_that_was_cut_off(source: Path, tmp_path: Path) -> None:
    copy = copy_with(source, tmp_path / "copy")
    checkpoint = Checkpoint.open(copy)
    plan = Plan.make(checkpoint, make_recipe())
    os.truncate(copy / "model.safetensors", (copy / "model.safetensors").stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends within model"):
        write(plan, tmp_path / "out", side_files(checkpoint, plan))
    assert not (tmp_path / "out").exists()
