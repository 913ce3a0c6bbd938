"""No process opens a connection where no hub id is given; where one is, the hub's client alone may."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import COMMANDS, ROOT
from toy import rows, write_base, write_recipe, write_rows
from watched import site_folder

from lora_cli import network
from lora_cli.data import hub
from lora_cli.errors import InputError


def in_process(folder: Path, *commands: list[str], **variables: str) -> tuple[list[int], str, list[str]]:
    """Run commands, online as far as the environment says; return codes, errors, and what the processes did."""
    environment = os.environ | site_folder(folder / "site") | variables
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LORA_CLI_HUB_OFFLINE"):
        environment.pop(name, None)
    seen = folder / "site/seen"
    seen.unlink(missing_ok=True)
    calls = "; ".join(f"codes.append({COMMANDS[name].__name__}({rest!r}))" for name, *rest in commands)
    several = "from lora_cli.data import processes; processes.CORES = 1"
    code = f"{several}; from lora_cli.cli import *; codes = []; {calls}; print('codes', *codes)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    codes = [int(word) for word in done.stdout.rpartition("codes")[2].split()]
    return codes, done.stderr, seen.read_text().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that lacks what transformers would ask the hub for, and a recipe whose rows take several processes."""
    folder = tmp_path_factory.mktemp("network")
    base = write_base(folder / "base")
    (base / "generation_config.json").unlink()
    path = base / "config.json"
    path.write_text(path.read_text().replace("{", '{"_name_or_path": "owner/name",', 1))
    files = [str(write_rows(folder / f"{name}.jsonl", rows(40))) for name in "ab"]
    write_recipe(folder, base, data__train=files, train__epochs=1)
    return folder


@pytest.mark.reliability("malicious")
def test_a_local_base_opens_no_connection(folder: Path) -> None:
    """No command, and no process that it starts, resolves a name or connects, though nothing but we forbids it."""
    cache = {"LORA_CLI_CACHE": str(folder / "cache")}
    codes, errors, seen = in_process(folder, ["train", "recipe.yaml"], **cache)
    assert codes == [0], errors
    assert len([line for line in seen if line.startswith("started")]) > 1  # the workers were watched too
    rest = [
        ["eval", "run"],
        ["merge", "run", "--output", "merged"],
        ["lora", "inspect", "run"],
        ["lora", "data", "recipe.yaml"],
    ]
    codes, errors, more = in_process(folder, *rest, **cache)
    assert codes == [0] * 4, errors
    assert [line for line in seen + more if not line.startswith("started")] == []


def test_a_hub_id_is_asked_for_and_nothing_else(folder: Path) -> None:
    """The hook sees what a hub id causes: so it would have seen the others."""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "home"), "NO_PROXY": "*"}
    model = ["train", "recipe.yaml", "model.base=owner/name"]
    rows_of_hub = ["lora", "data", "recipe.yaml", "data.train=owner/rows"]
    codes, errors, seen = in_process(folder, model, rows_of_hub, **environment)
    assert codes == [2, 2]
    assert "owner/name" in errors
    assert "owner/rows" in errors
    assert "ffline" not in errors
    connected = [line for line in seen if not line.startswith("started")]
    assert connected
    assert all("127.0.0.1" in line for line in connected)


def test_offline_is_in_effect_but_for_a_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within `closed` the hub's library is offline, in processes started meanwhile too; an offline user stays so."""
    from huggingface_hub import constants, is_offline_mode

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("LORA_CLI_HUB_OFFLINE", raising=False)
    with network.closed():
        assert is_offline_mode()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        with network.reachable():
            assert not is_offline_mode()
        assert is_offline_mode()
    assert not is_offline_mode()
    assert "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with network.closed(), network.reachable():
        assert is_offline_mode()


def test_telemetry_and_kernels_of_the_hub_are_off() -> None:
    """Importing the package is enough, whatever the environment said, and the libraries have read it."""
    code = (
        "import lora_cli.models.load\n"
        "from huggingface_hub import constants\n"
        "from transformers.integrations import hub_kernels\n"
        "import datasets\n"
        "print(constants.HF_HUB_DISABLE_TELEMETRY, hub_kernels._kernels_enabled)\n"
        "print(datasets.config.HF_UPDATE_DOWNLOAD_COUNTS)"
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_TELEMETRY": "0",
        "USE_HUB_KERNELS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


def test_a_data_set_of_pickles_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The datasets library is not asked to read what its `pandas` reader would unpickle."""
    from artefacts import CANARY, pickled

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/train.pkl").write_bytes(pickled(tmp_path))
    hub.load_hub.cache_clear()
    with pytest.raises(InputError, match=r"reads its files as 'pandas'|cannot be loaded"):
        hub.load_hub("owner/name", "train")
    hub.load_hub.cache_clear()
    assert not (tmp_path / CANARY).exists()
