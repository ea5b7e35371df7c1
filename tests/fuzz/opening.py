"""Opens checkpoints and writes two tokens with each, in a fresh process every time.

One process imports everything, computes nothing, and forks a child for each checkpoint. A child that crashes or hangs harms
nothing else.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Seconds after which a child is killed because it hangs.
PATIENCE = 20.0


@dataclass(frozen=True)
class Opened:
    """What came of opening a checkpoint.

    Attributes:
        kind: ``works``, ``refused``, ``CRASH`` (another exception than the package's, or a signal) or ``HANG``.
        message: the error.
        tokens: what was written.
        seconds: how long it took.
        megabytes: the most memory that the process had, including the 500 or so that it begins with.
    """

    kind: str
    message: str = ""
    tokens: tuple[int, ...] = ()
    seconds: float = 0.0
    megabytes: int = 0


class Opener:
    """Opens checkpoints."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def open(self, folder: Path, backend: str) -> Opened:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(folder), backend]), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return Opened(**{**answer, "tokens": tuple(answer["tokens"])})


@contextmanager
def opener() -> Iterator[Opener]:
    """Start the process that forks."""
    command = [sys.executable, "-c", "from fuzz.opening import serve; serve()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        yield Opener(process)


# --- in the process that forks ---


def serve() -> None:
    """Read a folder and a backend from each line of standard input, and answer with a line of JSON."""
    import mlx.core  # noqa: F401 (imported once; only the children use it)
    import torch
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import mlx_diffgemma.backends.mlx.backend
    import mlx_diffgemma.backends.torch.backend  # noqa: F401

    torch.set_num_threads(1)  # a thread of the parent would be missing in the children
    for line in sys.stdin:
        print(json.dumps(asdict(_fork(*json.loads(line)))), flush=True)


def _fork(folder: str, backend: str) -> Opened:
    reading, writing = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if not child:
        os.close(reading)
        _child(folder, backend, writing)
    os.close(writing)
    answer = b""
    while time.perf_counter() - started < PATIENCE:
        if select.select([reading], [], [], 0.5)[0]:
            part = os.read(reading, 1 << 20)
            if not part:
                break
            answer += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status, used = os.wait4(child, 0)
    seconds, megabytes = time.perf_counter() - started, used.ru_maxrss >> (20 if sys.platform == "darwin" else 10)
    if seconds >= PATIENCE:
        return Opened("HANG", seconds=seconds, megabytes=megabytes)
    if not answer:
        problem = f"the process ended with {os.waitstatus_to_exitcode(status)}"
        return Opened("CRASH", problem, seconds=seconds, megabytes=megabytes)
    return Opened(**json.loads(answer), seconds=seconds, megabytes=megabytes)


def _child(folder: str, backend: str, answers: int) -> None:
    """Open the checkpoint, write the answer, and end the process."""
    try:
        answer = _open(folder, backend)
    except BaseException as broken:  # noqa: BLE001 (a forked child must not return into the code of its parent)
        answer = {"kind": "CRASH", "message": f"{type(broken).__name__}: {broken}"[:500]}
    os.write(answers, json.dumps(answer).encode("utf-8", "backslashreplace"))
    os._exit(0)


def _open(folder: str, backend: str) -> dict[str, object]:
    from mlx_diffgemma import DiffGemmaError, load

    try:
        written = load(folder, backend=backend, device="cpu").generate("Hi", seed=1, max_new_tokens=2, max_denoising_steps=2)
    except DiffGemmaError as refused:
        return {"kind": "refused", "message": str(refused)}
    return {"kind": "works", "tokens": written.tokens}
