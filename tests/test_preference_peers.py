"""DPO beside TRL's DPOTrainer on real pairs: the same ids, start, order and losses."""

from __future__ import annotations

from pathlib import Path

import preference
import pytest

pytest.importorskip("trl", reason="trl is not installed")


def test_dpo_is_trls(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On real pairs, whose prompts are shared, each step's loss is TRL's to 1e-4; an allowance of nothing is missed."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    arguments = ["parity", "--rows", str(shared_data / "dpo_en_demo.json"), "--results", str(tmp_path)]
    arguments += ["--threads", "1", "--max-length", "200", "--parity-steps"]
    assert preference.main([*arguments, "4"]) == 0
    assert "relative in every step" in capsys.readouterr().out
    monkeypatch.setattr(preference, "ALIKE", 0.0)
    assert preference.main([*arguments, "1"]) == 1
    assert "losses are up to" in capsys.readouterr().err
