"""The documentation of the commands agrees with their own help."""

import re
import subprocess
import sys
from pathlib import Path

from mlx_diffgemma.cli import COMMANDS

ROOT = Path(__file__).parents[1]


def test_commands_page_is_current() -> None:
    # In a separate process, because click keeps the first form in which a command was called, with or without the group's -h.
    program = f"import runpy; print(runpy.run_path({str(ROOT / 'docs' / 'commands.py')!r})['page'](), end='')"
    page = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "commands.md").read_text() == page, "run: python docs/commands.py"


def test_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"| `{name}" not in readme] == []


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
