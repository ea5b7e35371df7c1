"""Writes docs/commands.md: the --help of every command on one page. A test checks that the page is current.

python docs/commands.py
"""

from pathlib import Path

from click.testing import CliRunner

from mlx_diffgemma.cli import COMMANDS, main

PAGE = Path(__file__).with_name("commands.md")


def page() -> str:
    parts = ["# Commands\n\nThe help of every command. `python docs/commands.py` writes this page.\n"]
    for command in ("", *COMMANDS):
        arguments = [*([command] if command else []), "--help"]
        text = CliRunner().invoke(main, arguments, prog_name="mlx-diffgemma", terminal_width=100).output
        parts.append(f"## {' '.join(['mlx-diffgemma', command]).strip()}\n\n```\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
