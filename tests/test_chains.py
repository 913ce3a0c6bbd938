"""Several objectives in one recipe, by the command line: what is left behind, kills at every place, refusals."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import run_here, snapshot
from forked_commands import ERRORS, OUTPUT, ForkServer
from run_results import differences, leftovers, result_of
from test_processes import in_two_processes, losses_of
from toy import lora, pairs, rows, write_recipe, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")
GRPO: dict[str, Any] = {
    "name": "grpo", "stage": "rl", "rewards": [{"name": "regex", "pattern": "[aeiou]"}], "samples": 2, "beta": 0.05,
    "updates_per_rollout": 2, "sampling": {"max_new_tokens": 6}, "train": {"max_steps": 4},
}  # fmt: skip
DPO: dict[str, Any] = {
    "name": "dpo", "data": {"train": "pairs.jsonl", "eval": "held.jsonl"}, "train": {"max_steps": 4}
}  # fmt: skip
SFT: dict[str, Any] = {"name": "sft", "train": {"max_steps": 4}}
BY_REWARD = [{"name": "reward_model", "run": "stage:reward"}]
PPO = GRPO | {
    "name": "ppo", "rewards": BY_REWARD,
    "evaluate": {"metrics": ["loss", "win_rate"], "win_rate": {"rewards": BY_REWARD}},
}  # fmt: skip
RLHF = (SFT | {"train": {"max_steps": 2}}, DPO | {"name": "reward"}, PPO)


def write_chain(folder: Path, base: Path, *objectives: dict[str, Any], **changes: Any) -> Path:
    """Write a chain that saves at every step; all but the base is named relative to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "pairs.jsonl", pairs(24))
    write_rows(folder / "held.jsonl", pairs(8))
    settings = {
        "objective": list(objectives or (SFT, DPO)), "data__train": "train.jsonl", "data__eval": "eval.jsonl",
        "adapter": {"method": "lora", "rank": 4, "dropout": 0.1}, "train__save_every": 1, "run__output": "run",
        **changes,
    }  # fmt: skip
    return write_recipe(folder, base, **settings)


def results(run: Path) -> dict[str, object]:
    """Return what must be equal in two chains: that of each stage, and the summary without its times."""
    summary = json.loads((run / "summary.json").read_text())
    for stage in summary["stages"]:
        del stage["seconds"]
    found: dict[str, object] = {"summary": summary, "recipe": (run / "recipe.yaml").read_bytes()}
    for stage in run.glob("[0-9]*"):
        found |= {f"{stage.name}/{name}": value for name, value in result_of(stage).items()}
    return found


def test_what_a_chain_leaves_behind(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A folder for each stage, the list resolved, a summary; the commands mean its last policy, and it is known."""
    monkeypatch.chdir(tmp_path)
    write_chain(tmp_path, base, SFT, DPO, GRPO)
    ended = run_here(capsys, "train", "recipe.yaml", "--min", "reward=-5")
    assert ended.code == 0, ended
    run = tmp_path / "run"
    visible = sorted(path.name for path in run.iterdir())
    assert visible == ["1-sft", "2-dpo", "3-rl", "recipe.yaml", "summary.json"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done"
    assert [(one["name"], one["folder"], one["status"]) for one in summary["stages"]] == [
        ("sft", "1-sft", "done"), ("dpo", "2-dpo", "done"), ("rl", "3-rl", "done")
    ]  # fmt: skip
    assert summary["stages"][0]["eval"]["tuned"]["loss"] < summary["stages"][0]["eval"]["base"]["loss"]
    assert summary["stages"][2]["eval"]["tuned"].keys() >= {"reward"}
    assert leftovers(run) == []
    shown = run_here(capsys, "lora", "recipe", "show", "run/recipe.yaml").output
    assert yaml.safe_load(shown) == yaml.safe_load((run / "recipe.yaml").read_text())
    of_chain, of_stage = (run_here(capsys, "eval", name, "--json") for name in ("run", "run/3-rl"))
    assert json.loads(of_chain.output) == json.loads(of_stage.output)
    assert run_here(capsys, "merge", "run", "--output", "merged").code == 0
    assert run_here(capsys, "lora", "inspect", "run").code == 0
    before = results(run)
    again = run_here(capsys, "train", "recipe.yaml", "--min", "reward=5")
    assert again.code == 5  # the gate is on the last stage's scores
    assert again.output.count("finished already") == 3
    assert differences(results(run), before) == []


@pytest.mark.parametrize(
    ("objectives", "places"),
    [
        (
            (SFT, DPO),
            (
                "after-rename:kill:step-2",  # in the first stage, where a checkpoint has just appeared
                "half-file:kill:adapter",  # while what the second stage starts from is written
                "folder-made:kill:step-1",  # the second stage has begun, and has no checkpoint
                "after-rename:kill:step-2",  # in the second stage
            ),
        ),
        # At the end of the first stage, and in the middle of a rollout, which serves two steps.
        ((SFT, GRPO), ("after-rename:kill:step-4", "after-rename:kill:step-1")),
    ],
)
def test_a_killed_chain_ends_in_the_same_bytes(
    server: ForkServer,
    base: Path,
    tmp_path: Path,
    objectives: tuple[dict[str, Any], ...],
    places: tuple[str, ...],
) -> None:
    """SIGKILL in each stage and between them, one after the other; the same command ends as if nothing had been."""
    write_chain(tmp_path / "whole", base, *objectives)
    server.succeed(tmp_path / "whole", "train", "recipe.yaml")
    expected = results(tmp_path / "whole" / "run")
    folder = tmp_path / "killed"
    write_chain(folder, base, *objectives)
    for place in places:
        server.start(folder, "train", "recipe.yaml", environment={"LORA_FAILPOINT": place})
        assert server.code() == -9, (place, (folder / ERRORS).read_text())
    server.succeed(folder, "train", "recipe.yaml")
    assert differences(results(folder / "run"), expected) == []
    assert leftovers(folder) == []


def test_rlhf_killed_anywhere_ends_in_the_same_bytes(server: ForkServer, base: Path, tmp_path: Path) -> None:
    """sft, a reward model and ppo rewarded by it, killed in and between them, is the chain in one piece, draws too."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for one in (whole, folder):
        write_chain(one, base, *RLHF)
    server.succeed(whole, "train", "recipe.yaml")
    run = folder / "run"
    for place, begun in (
        ("folder-made:kill:step-3", "2-reward"),  # a third step of the reward model is lost
        ("half-file:kill:adapter", "2-reward"),  # its export is half written, with the head
        (None, "2-reward"),  # it has just been finished
        ("after-rename:kill:step-1", "3-rl"),  # between two updates of one rollout
        ("folder-made:kill:step-4", "3-rl"),
    ):
        server.start(folder, "train", "recipe.yaml", environment={"LORA_FAILPOINT": place} if place else None)
        deadline = time.monotonic() + 60
        while place is None and not (run / "2-reward" / "summary.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert (server.code() if place else server.kill()) == -9, (place, (folder / ERRORS).read_text())
        assert max(path.parent.name for path in run.glob("*/checkpoints")) == begun or place is None, place
    server.succeed(folder, "train", "recipe.yaml")
    assert differences(results(folder / "run"), results(whole / "run")) == []
    drawn, expected = (one / "run" / "3-rl" / "rollouts.jsonl" for one in (folder, whole))
    assert drawn.read_bytes() == expected.read_bytes()
    assert leftovers(folder) == []
    assert server.run(folder, "recipe", "show", "recipe.yaml").output.count("stage:reward") == 2
    scores = json.loads((folder / "run" / "summary.json").read_text())["stages"][2]["eval"]
    found = json.loads(server.run(folder, "eval", "run", "--json").output)
    assert found["tuned"] == pytest.approx(scores["tuned"], abs=1e-6)
    assert found["tuned"].keys() >= {"reward", "win_rate"}
    run.rename(folder / "moved")
    moved = server.run(folder, "train", "recipe.yaml", "run.output=moved")
    assert moved.output.count("finished already") == 3, moved


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_chain_stopped_by_a_signal_goes_on(
    server: ForkServer, base: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A signal in the second stage saves it and ends with its code; the first is not made again by what follows."""
    write_chain(tmp_path, base, SFT, DPO | {"train": {"max_steps": 400}})
    server.start(tmp_path, "train", "recipe.yaml")
    run, deadline = tmp_path / "run", time.monotonic() + 60
    while not list(run.glob("2-dpo/checkpoints/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.signal(number)
    assert server.code() == 128 + number
    before = {path: path.stat().st_mtime_ns for path in (run / "1-sft").rglob("*")}
    step = max(int(path.name.partition("-")[2]) for path in run.glob("2-dpo/checkpoints/step-*"))
    server.succeed(tmp_path, "train", "recipe.yaml", f"objective.1.train.max_steps={step + 2}")
    assert {path: path.stat().st_mtime_ns for path in (run / "1-sft").rglob("*")} == before
    printed = (tmp_path / OUTPUT).read_text()
    assert "1-sft: finished already" in printed
    assert f"continuing after step {step}" in printed


def test_bad_input_of_any_stage_is_told_before_the_first(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing files of all stages come together with their places; rows that fail later leave no folder behind."""
    monkeypatch.chdir(tmp_path)
    path = write_chain(tmp_path, base, SFT, DPO | {"data": {"train": "pears.jsonl", "eval": "hold.jsonl"}})
    before = snapshot(tmp_path)
    for arguments in (["--check"], []):
        ended = run_here(capsys, "train", "recipe.yaml", *arguments)
        assert ended.code == 2
        lines = ended.errors.splitlines()
        assert len(lines) == 2
        assert all(line.startswith("error: recipe.yaml:") and "no such file" in line for line in lines)
        assert "did you mean pairs.jsonl" in lines[0]
    write_chain(tmp_path, base, SFT | {"data": {"train": "pairs.jsonl"}}, DPO)
    assert "cannot learn from" in run_here(capsys, "train", "recipe.yaml").errors
    assert not (tmp_path / "run").exists()
    assert snapshot(tmp_path).keys() - before.keys() <= {
        name for name in snapshot(tmp_path) if name.startswith("cache")
    }
    path.write_text(path.read_text().replace("base: ", "bass: "))
    assert "did you mean model.base" in run_here(capsys, "train", "recipe.yaml").errors


def test_a_chain_is_checked_without_training(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--check` reads the recipe and the rows of every stage, says so by its name, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    write_chain(tmp_path, base)
    before = snapshot(tmp_path)
    ended = run_here(capsys, "train", "recipe.yaml", "--check")
    assert ended.code == 0, ended
    assert "stage sft: data.train" in ended.output
    assert "stage dpo: data.train" in ended.output
    assert snapshot(tmp_path) == before
    data = run_here(capsys, "lora", "data", "recipe.yaml")
    assert data.code == 2
    assert "objective: found a list" in data.errors


def test_other_stages_are_not_mixed_in(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with other stages, or with a plain run, is refused; --overwrite makes all anew."""
    monkeypatch.chdir(tmp_path)
    write_chain(tmp_path, base, SFT)
    assert run_here(capsys, "train", "recipe.yaml").code == 0
    write_chain(tmp_path, base, DPO)
    ended = run_here(capsys, "train", "recipe.yaml")
    assert ended.code == 2
    assert "holds other stages: 1-sft (--overwrite removes them" in ended.errors
    (tmp_path / "run" / "1-sft" / "notes.txt").write_text("mine")
    assert run_here(capsys, "train", "recipe.yaml", "--overwrite").code == 0
    assert sorted(path.name for path in (tmp_path / "run" / "1-sft").iterdir()) == ["notes.txt"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stages"][0]["name"] == "dpo"
    one = write_recipe(tmp_path / "one", base, run__output=str(tmp_path / "run"))
    assert "is not a run of lora-cli" in run_here(capsys, "train", str(one)).errors
    assert run_here(capsys, "train", str(one), "run.output=plain").code == 0
    write_chain(tmp_path, base, SFT, run__output="plain")
    assert "no stages of a recipe" in run_here(capsys, "train", "recipe.yaml").errors


def test_rows_of_principles_go_into_the_next_stage(tmp_path: Path, base: Path) -> None:
    """A constitution in a chain answers with the model as the stage before left it, and its rows are trained on."""
    from lora_cli import chain
    from lora_cli.recipe.chain import Chain, load

    principles = [
        {"name": "brief", "critique": "Is it brief?", "revision": "Be brief.", "judge": "Which is brief?"}
    ]
    (tmp_path / "principles.yaml").write_text(yaml.safe_dump({"principles": principles}))
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows(4)])
    constitution = {
        "name": "constitution", "stage": "ai", "file": str(tmp_path / "principles.yaml"), "answer_tokens": 6,
        "prompts": str(tmp_path / "prompts.jsonl"), "samples": 0,
    }  # fmt: skip
    path = write_chain(
        tmp_path, base, {"name": "sft", "train": {"max_steps": 1}}, constitution,
        {"name": "sft", "stage": "revised", "data": {"train": "stage:ai/sft.jsonl"}, "train": {"max_steps": 1}},
        data__train=str(tmp_path / "train.jsonl"), data__eval=None, run__output=str(tmp_path / "run"),
        model__base="tiny",
    )  # fmt: skip
    found = load(path)
    assert isinstance(found, Chain)
    summary = chain.train(found)
    assert [stage["status"] for stage in summary["stages"]] == ["done"] * 3
    made = json.loads((tmp_path / "run" / "2-ai" / "made_of.json").read_text())
    trained = json.loads((tmp_path / "run" / "3-revised" / "summary.json").read_text())["fingerprints"]
    assert made["adapter.init_from"] is not None
    assert trained["adapter.init_from"] == made["adapter.init_from"]


def test_two_processes_run_a_chain_as_one(tmp_path: Path, base: Path) -> None:
    """Under torchrun each stage of two processes has the losses of one process, and one of them speaks and writes."""
    alone, two = (
        write_chain(tmp_path / name, base, **_absolute(tmp_path / name)) for name in ("alone", "two")
    )
    assert lora("train", alone).returncode == 0
    ended = in_two_processes(two)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("stage 2 of 2") == 1
    for stage in ("1-sft", "2-dpo"):
        first, second = (losses_of(path.parent / "run" / stage) for path in (alone, two))
        assert second == pytest.approx(first, rel=1e-5)
    assert leftovers(tmp_path / "two" / "run") == []


def _absolute(folder: Path) -> dict[str, Any]:
    """Return what of a chain is named from here, without dropout, whose draws depend on the batches."""
    files = {"data__train": "train.jsonl", "data__eval": "eval.jsonl", "run__output": "run"}
    objective = [SFT, DPO | {"data": {key: str(folder / name) for key, name in DPO["data"].items()}}]
    named = {key: str(folder / name) for key, name in files.items()}
    return named | {"adapter": {"method": "lora", "rank": 4}, "objective": objective}
