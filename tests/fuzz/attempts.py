"""Runs ``mlx-diffgemma`` many times, each in a fresh process, and lets it die or fail at a chosen moment.

One process imports everything and keeps a single thread. It forks a child for each attempt, which takes milliseconds. The
sabotage happens in the child, so nothing of it is in the product.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: Seconds after which an attempt is killed because it hangs.
PATIENCE = 60.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Sabotage:
    """What happens to an attempt.

    Attributes:
        after: seconds after the start at which it gets the signal, or at which a file is replaced; None if neither happens.
        signal: number of the signal.
        replace: a file, and the file that it is overwritten with, instead of the signal.
        operation: the number of the operation on files (open, rename, mkdir, remove, rmdir, write, fsync) at which it gets the
            signal; 0 if at none.
        error: the number of the error with which that operation fails, instead of the signal; 0 if it gets the signal.
    """

    after: float | None = None
    signal: int = signal.SIGKILL
    replace: tuple[str, str] | None = None
    operation: int = 0
    error: int = 0


@dataclass(frozen=True)
class Attempt:
    """One run of the command. ``place`` is the path whose files the sabotage counts operations on."""

    arguments: tuple[str, ...]
    place: str = ""
    sabotage: Sabotage = Sabotage()


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt: its exit status or minus the signal that ended it, its standard error, and its seconds."""

    status: int
    stderr: str
    seconds: float


class Runner:
    """Runs attempts."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, *together: Attempt) -> list[Outcome]:
        """Run attempts at the same time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([asdict(each) for each in together]), file=self._process.stdin, flush=True)
        return [Outcome(**each) for each in json.loads(self._process.stdout.readline())]


@contextmanager
def runner(folder: Path) -> Iterator[Runner]:
    """Start the process that forks. ``folder`` gets the standard error of the attempts."""
    command = [sys.executable, "-c", "from fuzz.attempts import serve; serve()"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment, pipe = {**os.environ, "PYTHONPATH": paths}, subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield Runner(process)


# --- in the process that forks ---


def serve() -> None:
    """Read lists of attempts from standard input, one a line, and answer each with a line of outcomes."""
    import mlx.core  # noqa: F401 (imported once; only the children use it)

    import mlx_diffgemma.cli.convert
    import mlx_diffgemma.convert.shards  # noqa: F401

    for line in sys.stdin:
        together = [Attempt(given["arguments"], given["place"], Sabotage(**given["sabotage"])) for given in json.loads(line)]
        print(json.dumps([asdict(outcome) for outcome in _run(together)]), flush=True)


@dataclass
class _Running:
    attempt: Attempt
    process: int
    log: Path
    started: float
    outcome: Outcome | None = None

    @classmethod
    def start(cls, attempt: Attempt, log: Path) -> "_Running":
        log.write_text("")
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the child can take them
        process = os.fork()
        if not process:
            _child(attempt, log)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return cls(attempt, process, log, time.perf_counter())

    def poll(self) -> None:
        seconds, sabotage = time.perf_counter() - self.started, self.attempt.sabotage
        ended, status = os.waitpid(self.process, os.WNOHANG)
        if ended:
            self.outcome = Outcome(os.waitstatus_to_exitcode(status), self.log.read_text(), seconds)
        elif seconds > PATIENCE:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            self.outcome = Outcome(-signal.SIGALRM, "it hung, and was killed", seconds)
        elif sabotage.after is not None and seconds > sabotage.after:
            if sabotage.replace is None:
                os.kill(self.process, sabotage.signal)
            else:
                shutil.copyfile(sabotage.replace[1], sabotage.replace[0])
            self.attempt = Attempt(self.attempt.arguments)  # only once


def _run(together: Sequence[Attempt]) -> list[Outcome]:
    running = [_Running.start(attempt, Path(f"stderr-{index}")) for index, attempt in enumerate(together)]
    while waiting := [each for each in running if each.outcome is None]:
        for each in waiting:
            each.poll()
        time.sleep(0.0003)
    return [each.outcome for each in running if each.outcome is not None]


def _child(attempt: Attempt, log: Path) -> None:
    """Run the command, and end the process."""
    status = 3
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        for descriptor, path in enumerate(("/dev/null", "/dev/null", str(log))):
            os.dup2(os.open(path, os.O_RDWR), descriptor)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
        if attempt.sabotage.operation:
            _sabotage(attempt.place, attempt.sabotage)
        from mlx_diffgemma.cli import main

        main(list(attempt.arguments))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:  # before the command began
        status = 130
    except BaseException:  # noqa: BLE001 (a forked child must not return into the code of its parent)
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _sabotage(place: str, sabotage: Sabotage) -> None:
    """Count the operations on files whose path begins with ``place``, and strike at the chosen one."""
    from mlx_diffgemma.convert import work

    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == sabotage.operation:
            if not sabotage.error:
                os.kill(os.getpid(), sabotage.signal)
            else:
                raise OSError(sabotage.error, os.strerror(sabotage.error), place)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:  # called before the operation
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(arguments[0]).startswith(place):
            tick()

    fsync = os.fsync

    def struck(descriptor: Any) -> None:
        tick()
        fsync(descriptor)

    class Struck:
        """A file whose writes are counted, and which writes half of the data that it fails on."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> "Struck":
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: Any) -> int:
            try:
                tick()
            except OSError:
                self._file.write(memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
                raise
            written: int = self._file.write(data)
            return written

    def opened(path: Path, mode: str) -> Any:
        return Struck(open(path, mode)) if "x" in mode else open(path, mode)

    sys.addaudithook(audit)
    os.fsync = struck  # type: ignore[assignment]
    work.open = opened  # type: ignore[attr-defined]
