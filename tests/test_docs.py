"""What the documents say of the commands is what the commands say of themselves."""

import importlib.util
import re
from pathlib import Path

from mlx_diffgemma.cli import COMMANDS

ROOT = Path(__file__).parents[1]


def test_commands_page_is_current() -> None:
    specification = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "commands.py")
    assert specification
    assert specification.loader
    commands = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(commands)
    assert commands.PAGE.read_text() == commands.page(), "run: python docs/commands.py"


def test_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"| `{name}" not in readme] == []


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
