"""The memory that a machine has, and the refusal of checkpoints that do not fit into it."""

import io
from pathlib import Path

import pytest

from mlx_diffgemma.backends import Place
from mlx_diffgemma.backends.memory import main_memory, require_memory
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli.loading import loading_bar
from mlx_diffgemma.errors import BackendError
from support.checkpoints import HUB, make_hub_layout

GB = 1_000_000_000


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {layout: Checkpoint.open(make_hub_layout(tmp_path_factory.mktemp("hub") / layout, layout)) for layout in HUB}


def place(dtype: str, memory: int | None) -> Place:
    return Place("torch", "cuda:0", dtype, ("float32", "bfloat16"), memory)


def test_the_released_model_fits_or_is_refused_with_what_would_fit(hub: dict[str, Checkpoint]) -> None:
    def refusal(layout: str, dtype: str, memory: int) -> str:
        with pytest.raises(BackendError) as error:
            require_memory(hub[layout], place(dtype, memory))
        print(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    require_memory(hub["hub_bf16"], place("bfloat16", 80 * GB))
    require_memory(hub["hub_4bit"], place("bfloat16", 24 * GB))
    require_memory(hub["hub_bf16"], place("float32", None))
    line = refusal("hub_bf16", "float32", 80 * GB)
    assert "needs 106.9 GB in float32 (weights 103.3 GB" in line
    assert "torch on cuda:0 has only 80.0 GB free" in line
    assert "What would fit: dtype bfloat16, with 55.0 GB, or its 4-bit conversion, with about 19.9 GB." in line
    line = refusal("hub_bf16", "bfloat16", 24 * GB)
    assert "What would fit: its 4-bit conversion, with about 19.9 GB." in line
    assert "Use a machine with more memory." in refusal("hub_4bit", "bfloat16", 16 * GB)


def test_the_estimate_of_a_conversion_is_the_size_of_the_published_one(hub: dict[str, Checkpoint]) -> None:
    with pytest.raises(BackendError) as error:
        require_memory(hub["hub_bf16"], place("bfloat16", 24 * GB))
    estimate = float(str(error.value).partition("with about ")[2].split()[0])
    weights = hub["hub_4bit"].nbytes / GB
    assert estimate == pytest.approx(weights + 12 * 256 * 262_144 * 4 / GB, abs=0.3)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 32000000 kB\nMemFree: 100 kB\nMemAvailable: 20000000 kB\n"}
GROUP = "sys/fs/cgroup/"
OWN_GROUP = {"proc/self/cgroup": "0::/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 20_480_000_000),
        ({**MEMINFO, **OWN_GROUP, f"{GROUP}memory.max": "max\n", f"{GROUP}memory.current": "5\n"}, 20_480_000_000),
        # A container's own group, as seen from inside.
        ({**MEMINFO, **OWN_GROUP, f"{GROUP}memory.max": "4000000000\n", f"{GROUP}memory.current": "1000\n"}, 3_999_999_000),
        # The limit of a group above counts too, and files that can be dropped are free.
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/a/b\n",
                f"{GROUP}a/b/memory.max": "max\n",
                f"{GROUP}a/b/memory.current": "900\n",
                f"{GROUP}a/memory.max": "2000\n",
                f"{GROUP}a/memory.current": "1500\n",
                f"{GROUP}a/memory.stat": "anon 5\ninactive_file 700\nactive_file 1\n",
            },
            1200,
        ),
        # The first version of control groups, and a group whose folder this container does not see.
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "9:cpu:/\n4:memory,hugetlb:/elsewhere\n",
                f"{GROUP}memory/memory.limit_in_bytes": "3000\n",
                f"{GROUP}memory/memory.usage_in_bytes": "1000\n",
                f"{GROUP}memory/memory.stat": "total_inactive_file 100\n",
            },
            2100,
        ),
        ({**MEMINFO, **OWN_GROUP, f"{GROUP}memory.max": "10\n", f"{GROUP}memory.current": "20\n"}, 0),
    ],
)  # fmt: skip
def test_memory_of_linux(files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert main_memory(write(tmp_path, files)) == expected


def test_memory_of_this_machine() -> None:
    memory = main_memory()
    assert memory is not None
    assert 10_000_000 < memory < 10**14


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shows in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        with loading_bar() as progress:
            for done in (1_000_000, 4_000_000, 4_000_000):
                progress(done, 4_000_000)
        assert ("loading" in stream.getvalue()) == shows
        assert ("4.0/4.0 MB" in stream.getvalue()) == shows
        if shows:
            assert stream.getvalue().endswith("\x1b[2K"), "the bar is removed"
