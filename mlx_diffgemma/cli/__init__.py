"""The command line ``mlx-diffgemma``: what a person asked for on standard output, everything else on standard error.

Exit status: 0, or 2 with one line that says what is wrong, or 130 after Ctrl-C. A traceback is a bug.
"""

import errno
import importlib
import os
import sys
from typing import Any

import click

from mlx_diffgemma.errors import DiffGemmaError

#: Each is a module of this package that has a command of its own name; it is imported when it is called for.
COMMANDS = ("generate", "infill", "revise", "chat", "serve", "demo", "info", "verify", "bench", "convert")


class _Failure(click.ClickException):
    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"mlx-diffgemma: error: {self.message}", file=file, err=file is None)


class _Commands(click.Group):
    """Finds the commands, and turns what goes wrong in them into a line and an exit status."""

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
            click.echo(err=True)  # ends the line that the text had reached
            ctx.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click ends quietly: nobody reads on
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (at exit Python would try, and fail, to write the rest again)
            place = f"{error.filename}: " if error.filename else ""
            raise _Failure(f"{place}{error.strerror or error}") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-diffgemma", message="%(prog)s %(version)s")
def main() -> None:
    """Run DiffusionGemma on Apple silicon (MLX) and on NVIDIA GPUs (PyTorch), with the same tokens.

    MODEL is everywhere a folder, or a hub id such as google/diffusiongemma-26B-A4B-it.
    """
    # transformers has advice for those who call it themselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
