"""A log that blocks nothing: lines pass a bounded queue, and a separate thread writes them."""

import logging
import os
import queue
import select
import sys
import threading
import time

#: Lines that may wait to be written. When nobody reads the log, further lines are dropped and counted.
MAX_LINES = 1000
#: Seconds that the end of the program waits for lines that are not written yet.
CLOSE_SECONDS = 1.0


def write_log(descriptor: int) -> "LogWriter":
    """Write the log of the whole process to a file descriptor, with one :class:`LogWriter`.

    Python's warnings become lines of the log. So do the messages of libraries that write to ``sys.stderr`` by a handler of their
    own, as transformers does: such a handler waits when nobody reads.
    """
    writer = LogWriter(descriptor)
    logging.basicConfig(handlers=[writer], level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    logging.getLogger("mlx_diffgemma").setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each client that leaves while the server writes
    for logger in tuple(logging.root.manager.loggerDict.values()):
        own = logger.handlers if isinstance(logger, logging.Logger) else []
        for handler in tuple(own):
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stderr, sys.__stderr__):
                logger.removeHandler(handler)  # type: ignore[union-attr]
                logger.propagate = True  # type: ignore[union-attr]
    return writer


class LogWriter(logging.Handler):
    """Writes the log to a file descriptor. If nobody reads the log, only this handler's thread waits.

    The thread does not use ``sys.stderr``: a thread that is stuck there holds a lock that the interpreter needs to exit.
    """

    def __init__(self, descriptor: int, max_lines: int = MAX_LINES) -> None:
        super().__init__()
        self._descriptor, self._lines = descriptor, queue.Queue[str](max_lines)
        self._refused = 0  # lines that found the queue full; guarded by the handler's lock
        self._failed = self._reported = 0  # lines that could not be written, and dropped lines that the log has reported
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many lines were not written."""
        return self._refused + self._failed

    def emit(self, record: logging.LogRecord) -> None:
        """Put a record into the queue. Never waits."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._refused += 1
        except Exception:  # noqa: BLE001 (a record that cannot be formatted must not end a request)
            self._refused += 1

    def flush(self) -> None:
        """Wait until all lines are written, for at most :data:`CLOSE_SECONDS`."""
        end = time.monotonic() + CLOSE_SECONDS
        while self._lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            if not self._write(line):
                self._failed += 1
            elif self._reported < (dropped := self.dropped) and self._write(self._report(dropped - self._reported)):
                self._reported = dropped
            self._lines.task_done()

    def _report(self, dropped: int) -> str:
        message = "1 log line was dropped" if dropped == 1 else f"{dropped} log lines were dropped"
        return self.format(logging.LogRecord("mlx_diffgemma.server", logging.WARNING, "", 0, message, None, None))

    def _write(self, line: str) -> bool:
        data = f"{line}\n".encode(errors="backslashreplace")
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # the descriptor does not wait by itself
                select.select([], [self._descriptor], [])
            except OSError:  # nobody reads the log any more, or the disk is full
                return False
        return True
