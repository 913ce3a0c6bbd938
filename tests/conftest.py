"""What every test folder shares: one thread, no network, the architectures, the real data where it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# One thread: tests run beside each other's processes on two cores, and sums have one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from forked_commands import ForkServer
from small import CONFIGS
from toy import write_base

torch.set_num_threads(1)

pytest_plugins = ["reliability_table"]

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(params=sorted(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Return the name of each architecture in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the toy model's folder, which no test changes."""
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Start commands without importing torch in each; the locale, the time zone and the order of sets are known."""
    with ForkServer(LC_ALL="C.UTF-8", TZ="UTC", PYTHONHASHSEED="0") as started:
        yield started


@pytest.fixture()
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the token cache of a test apart, and return where it is."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture()
def shared_data() -> Path:
    """Return the folder of real data beside the project, or skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data files (../shared/data) are not on this machine")
    return SHARED_DATA
