"""The command line ``mlx-diffgemma``: finds the commands and reports their errors.

Results go to standard output, everything else to standard error. The exit status is 0 on success, 2 after an error (one line
says what is wrong), and 130 after Ctrl-C. ``verify`` and ``demo`` also use 1. A traceback is a bug.
"""

import errno
import importlib
import os
import sys
from typing import Any

import click

from mlx_diffgemma.errors import DiffGemmaError, one_line

#: Each command is in the module of the same name, which is imported only when the command is used.
COMMANDS = ("generate", "infill", "revise", "chat", "serve", "demo", "info", "verify", "bench", "convert")


class _Failure(click.ClickException):
    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"mlx-diffgemma: error: {one_line(self.message)}", file=file, err=file is None)


class _Commands(click.Group):
    """Finds the commands, and turns their errors into one line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"mlx_diffgemma.cli.{cmd_name}"), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DiffGemmaError as error:
            raise _Failure(str(error)) from error
        except KeyboardInterrupt:
            click.echo(err=True)  # ends the unfinished line of text
            ctx.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader has closed the pipe, and click exits quietly
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (else Python tries to write the rest at exit, and fails again)
            place = f"{error.filename}: " if error.filename else ""
            raise _Failure(f"{place}{error.strerror or error}") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-diffgemma", message="%(prog)s %(version)s")
def main() -> None:
    """Run DiffusionGemma on Apple silicon (MLX) and on NVIDIA GPUs and CPUs (PyTorch), with the same tokens.

    In every command, MODEL is a folder, a hub id such as google/diffusiongemma-26B-A4B-it, or sudoku or pictures, the
    tiny models that come with this package.
    """
    # The warnings of transformers are for programs that call it directly.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
