"""The log's queue: what nobody reads is dropped, counted and reported, and blocks nothing."""

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from mlx_diffgemma.server import logs
from mlx_diffgemma.server.logs import LogWriter
from support.serving import until


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)


def log_lines(writer: LogWriter, count: int) -> None:
    for number in range(count):
        writer.handle(logging.LogRecord("x", logging.INFO, "", 0, "line %d", (number,), None))


@pytest.mark.parametrize("blocking", [True, False])
def test_an_unread_log_drops_lines_and_says_so(pipe: tuple[int, int], blocking: bool) -> None:
    reader, descriptor = pipe
    os.set_blocking(descriptor, blocking)
    writer = LogWriter(descriptor, max_lines=10)
    begin = time.monotonic()
    log_lines(writer, 20_000)
    assert time.monotonic() - begin < 5
    dropped = writer.dropped
    assert dropped > 0
    received = b""
    while received.count(b"\nline ") < 19_999 - dropped or _reported(received) < dropped:  # the first has none before it
        received += os.read(reader, 65536)
    assert len(re.findall(rb"^line \d+$", received, re.MULTILINE)) == 20_000 - dropped  # "1 log line was dropped" is none
    assert _reported(received) == writer.dropped == dropped


def _reported(received: bytes) -> int:
    """How many lines were dropped according to the log itself."""
    return sum(map(int, re.findall(rb"^(\d+) log lines? (?:was|were) dropped$", received, re.MULTILINE)))


def test_the_end_does_not_wait_for_a_reader(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1], max_lines=10)
    log_lines(writer, 20_000)
    begin = time.monotonic()
    writer.flush()
    assert time.monotonic() - begin < 10 * logs.CLOSE_SECONDS


def test_a_closed_log_is_counted() -> None:
    reader, descriptor = os.pipe()
    os.close(reader)
    writer = LogWriter(descriptor)
    log_lines(writer, 3)
    until(lambda: writer.dropped == 3)


def test_a_record_that_cannot_be_formatted_is_counted(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1])
    writer.handle(logging.LogRecord("x", logging.INFO, "", 0, "%d", ("no number",), None))
    assert writer.dropped == 1


def test_warnings_and_libraries_with_their_own_handler_use_the_log() -> None:
    code = """
import logging, sys, warnings
from mlx_diffgemma.server.logs import write_log
library = logging.getLogger("library")
library.addHandler(logging.StreamHandler())
library.propagate = False
inner = logging.getLogger("library.inner")
write_log(sys.stdout.fileno())
inner.warning("from a library")
warnings.warn("from Python")
logging.getLogger("mlx_diffgemma.server").info("from the server")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert [told in result.stdout for told in ("WARNING from a library", "from Python", "INFO from the server")] == [True] * 3
