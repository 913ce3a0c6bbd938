"""`objective:` as a list: which recipes its stages have, what is refused and where, and what is written of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli import adapters
from lora_cli.errors import InputError
from lora_cli.recipe import keys
from lora_cli.recipe.chain import Chain, dump_chain, load
from lora_cli.recipe.explain import explain
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.stage import OF_TRAINING, StageKeys

GOOD = """\
adapter: {method: lora, rank: 8, dropout: 0.1}
data: {train: shared.jsonl, max_length: 99}
train: {max_steps: 7, batch_size: 4}
objective:
  - {name: sft, train_on: completion, data: {train: a.jsonl, eval: b.jsonl}, train: {max_steps: 3}}
  - {name: constitution, stage: ai, file: c.yaml, samples: 2, rounds: 1}
  - {name: dpo, beta: 0.5, data: {train: "stage:ai/pairs.jsonl"}, export: {formats: [merged]}}
  - {name: sft, stage: again, data: {train: ["stage:ai/sft.jsonl", a.jsonl]}}
run: {output: out, seed: 5}
"""


def chain_of(tmp_path: Path, text: str, *overrides: str) -> Chain:
    """Return the chain in a text."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    found = load(path, overrides)
    assert isinstance(found, Chain)
    return found


def problems_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """Return the problems of a chain, without the name of its file."""
    try:
        chain_of(tmp_path, text, *overrides)
    except InputError as error:
        return [line.replace(f"{tmp_path / 'r.yaml'}:", "") for line in error.lines]
    return []


def test_each_stage_has_a_recipe_of_its_own(tmp_path: Path) -> None:
    """An entry's keys lie over the recipe's; each stage starts from the last one that trained the language model."""
    chain = chain_of(tmp_path, GOOD)
    sft, ai, dpo, again = (stage.recipe for stage in chain.stages)
    assert [stage.name for stage in chain.stages] == ["sft", "ai", "dpo", "again"]
    assert [stage.recipe.run.output for stage in chain.stages] == [
        "out/1-sft", "out/2-ai", "out/3-dpo", "out/4-again"
    ]  # fmt: skip
    assert {one.run.seed for one in (sft, ai, dpo, again)} == {5}
    assert (sft.data.train, sft.data.eval, sft.data.max_length) == ("a.jsonl", "b.jsonl", 99)
    assert (sft.train.max_steps, sft.train.batch_size, dpo.train.max_steps) == (3, 4, 7)
    assert sft.objective.train_on == "completion"  # type: ignore[union-attr]
    assert ai.constitution is not None
    assert (ai.constitution.file, ai.data.train) == ("c.yaml", "shared.jsonl")
    assert (dpo.data.train, dpo.data.eval) == ("out/2-ai/pairs.jsonl", None)
    assert again.data.train == ["out/2-ai/sft.jsonl", "a.jsonl"]
    starts = [sft.init_from(), ai.init_from(), dpo.init_from(), again.init_from()]
    assert starts == [None, "out/1-sft", "out/1-sft", "out/3-dpo"]
    assert [sft.adapter.rank, dpo.adapter.dropout] == [8, 0.1]  # type: ignore[union-attr]
    assert "rank" not in dpo.adapter.model_fields_set  # the stage before settles it
    assert dpo.export_formats() == ["merged", "peft"]  # the second is what `again` starts from
    assert chain.policy() is chain.stages[3]
    waits = [{"adapter.init_from"}, {"adapter.init_from", "data.train"}, {"adapter.init_from", "data.train"}]
    assert [stage.later for stage in chain.stages] == [set(), *waits]


def test_a_reward_model_of_the_chain_rewards_and_judges(tmp_path: Path) -> None:
    """`stage:NAME` is the folder of a reward stage for an objective and for a win rate, and of no other."""
    rewards = "[{name: reward_model, run: 'stage:rm'}]"
    text = (
        "data: {eval: held_out.jsonl}\nobjective:\n  - {name: sft}\n  - {name: reward, stage: rm}\n"
        f"  - {{name: ppo, rewards: {rewards}}}\n"
        f"  - {{name: sft, stage: last, evaluate: {{metrics: [win_rate], win_rate: {{rewards: {rewards}}}}}}}\n"
    )
    chain = chain_of(tmp_path, text)
    ppo, last = chain.stages[2].recipe, chain.stages[3].recipe
    assert ppo.objective.rewards[0].run == "runs/latest/2-rm"  # type: ignore[union-attr]
    won = last.evaluate.compares()
    assert won is not None
    assert won.rewards is not None
    assert won.rewards[0].run == "runs/latest/2-rm"
    assert [stage.later - {"adapter.init_from"} for stage in chain.stages[2:]] == [
        {"objective.rewards"}, {"evaluate.win_rate.rewards"}
    ]  # fmt: skip
    written = dump_chain(chain)
    assert written.count("stage:rm") == 2
    assert "2-rm" not in written
    lines = problems_of(tmp_path, text.replace("stage:rm", "stage:sft"))
    assert lines == [
        f"{place}: found stage:sft, but a run that rewards is a stage of the objective reward (name one)"
        for place in ("5:53: objective.rewards", "6:109: evaluate.win_rate.rewards")
    ]


@pytest.mark.parametrize("method", ["full", "relora"])
def test_a_method_without_a_start_goes_on_from_the_merged_model(tmp_path: Path, method: str) -> None:
    """The next stage's base is the merged model of the one before, which is written besides what is asked for."""
    chain = chain_of(tmp_path, f"adapter: {{method: {method}}}\nobjective: [{{name: sft}}, {{name: dpo}}]\n")
    first, second = (stage.recipe for stage in chain.stages)
    assert second.model.base == "runs/latest/1-sft/merged"
    assert "merged" in first.export_formats()
    assert ("peft" in first.export_formats()) is (method == "relora")
    assert chain.stages[1].later == {"model.base"}


def test_a_single_objective_is_no_chain(tmp_path: Path) -> None:
    """A recipe with one objective is read as it always was."""
    path = tmp_path / "r.yaml"
    path.write_text("objective: {name: dpo}\n")
    found = load(path)
    assert isinstance(found, Recipe)
    assert found == load_recipe(path)


def test_what_is_written_reads_back_as_the_same_chain(tmp_path: Path) -> None:
    """The resolved list has every default, names files of stages as references, and gives the same recipes."""
    chain = chain_of(tmp_path, GOOD)
    text = dump_chain(chain)
    assert "stage:ai/pairs.jsonl" in text
    assert "out/2-ai" not in text
    (tmp_path / "again").mkdir()
    again = chain_of(tmp_path / "again", text)
    assert [one.recipe.resolved() for one in again.stages] == [one.recipe.resolved() for one in chain.stages]
    assert dump_chain(again) == text


def test_overrides_reach_the_recipe_and_its_entries(tmp_path: Path) -> None:
    """`train.x` sets what entries share, `objective.N.train.x` one entry's; one that no stage would have is refused."""
    chain = chain_of(
        tmp_path, GOOD, "train.max_steps=9", "objective.2.train.max_steps=1", "objective.2.beta=0.2"
    )
    assert [stage.recipe.train.max_steps for stage in chain.stages] == [3, None, 1, 9]
    assert chain.stages[2].recipe.objective.beta == 0.2  # type: ignore[union-attr]
    two = "objective: [{name: sft, train: {epochs: 1}}, {name: dpo, train: {epochs: 2}}]\n"
    (line,) = problems_of(tmp_path, two, "train.epochs=3")
    assert line.startswith("override train.epochs=3: train.epochs: has no effect, every entry")
    assert not problems_of(tmp_path, two, "train.batch_size=3")
    for override, message in (
        ("objective.4.beta=1", "there is no entry 4 in the list at"),
        ("objective.beta=1", "leads into the list at"),
        ("objective.name.x=1", "there is no entry name"),
    ):
        found = problems_of(tmp_path, GOOD, override)
        assert len(found) == 1
        assert message in found[0], found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("objective: []\n", "1:1: objective: found an empty list (name at least one objective)"),
        ("objective: [sft]\n", "1:13: objective.0: is no block of keys (write name: sft, dpo, ...)"),
        (
            "objective:\n  - {name: sft}\n  - {name: sft}\n",
            "3:6: objective.1.stage: found sft twice (give one of the two another name: stage: NAME)",
        ),
        (
            "objective:\n  - {name: sft, stage: a/b}\n",
            "2:17: objective.0.stage: found the text 'a/b', which names no folder (use at most 64 letters, digits,"
            " dots, - and _)",
        ),
        (
            "objective:\n  - {name: sft}\n  - {name: dpo, beta: -1}\n",
            "3:17: objective.beta: found -1 (must be a number above 0 and at most 100)",
        ),
        (
            "objective:\n  - {name: sft, train: {epoch: 1}}\n",
            "2:25: train.epoch: unknown key (did you mean train.epochs?)",
        ),
        (
            "objective:\n  - {name: sft, data: {train: 'stage:b/sft.jsonl'}}\n  - {name: dpo, stage: b}\n",
            "2:31: data.train: found stage:b/sft.jsonl, which is no stage before this one (before it are none)",
        ),
        (
            "objective:\n  - {name: sft, stage: first}\n  - {name: dpo, data: {train: 'stage:frist/x.jsonl'}}\n",
            "3:31: data.train: found stage:frist/x.jsonl, which is no stage before this one (did you mean"
            " stage:first?)",
        ),
        (
            "objective:\n  - {name: sft}\n  - {name: dpo, data: {train: 'stage:sft/sft.jsonl'}}\n",
            "3:31: data.train: found stage:sft/sft.jsonl, but there is no such file of stage sft (sft makes no rows)",
        ),
        (
            "objective:\n  - {name: constitution, file: c.yaml, rounds: 0}\n"
            "  - {name: sft, data: {train: 'stage:constitution/sft.jsonl'}}\n",
            "3:31: data.train: found stage:constitution/sft.jsonl, but there is no such file of stage constitution"
            " (it makes pairs.jsonl)",
        ),
        (
            "constitution: {file: c.yaml}\nobjective: [{name: sft}]\n",
            "1:1: constitution: found beside a list of objectives (make it an entry: name: constitution)",
        ),
        (
            "objective:\n  - {name: constitution, file: c.yaml, train: {epochs: 1}}\n",
            "2:40: train: a constitution trains nothing (remove the block)",
        ),
        (
            "adapter: {add_tokens: [<x>]}\nobjective: [{name: sft}, {name: dpo}]\n",
            "1:11: adapter.add_tokens: found '<x>', but no stage can start from rows of single tokens (train them"
            " alone, merge with lora-merge, and give that as model.base)",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    """One line with file, line, column, key, and what to do."""
    assert problems_of(tmp_path, text) == [expected]


def test_all_stages_are_read_in_one_pass(tmp_path: Path) -> None:
    """Faults of several entries and of what they share come together, each once, in the order of the file."""
    text = "data: {max_lenght: 3}\nobjective:\n  - {name: sft, bta: 1}\n  - {name: dpo, train: {epochs: 0}}\n"
    lines = problems_of(tmp_path, text)
    assert [line.split(": ")[1] for line in lines] == ["data.max_lenght", "objective.bta", "train.epochs"]


def test_what_a_later_stage_leaves_to_the_one_before_is_known(tmp_path: Path) -> None:
    """Each key of an adapter is either of training alone, or settled by the adapter that a stage starts from."""
    for method in adapters.names():
        settled = {name for name, how in adapters.method_class(method).start_keys.items() if how != "free"}
        for key in keys.all_keys():
            if key.path.startswith("adapter.") and key.variant == method and settled:
                others = {"init", "init_from", "eva_rho", "eva_tokens", "train_tokens", "add_tokens"}
                assert key.leaf in OF_TRAINING | settled | others, key.path
                assert key.leaf not in OF_TRAINING & settled


def test_other_commands_say_that_they_take_one_objective(tmp_path: Path) -> None:
    """What reads one recipe refuses a list in one line."""
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    with pytest.raises(InputError, match=r"r\.yaml:4:1: objective: found a list, which lora-train runs"):
        load_recipe(path)


def test_the_json_schema_and_explain_know_stages() -> None:
    """An editor is told the keys of an entry for each objective; `explain` documents those of a stage."""
    schema = keys.json_schema()
    (stages,) = (one for one in schema["properties"]["objective"]["anyOf"] if one.get("type") == "array")
    kinds = [schema["$defs"][one["$ref"].rpartition("/")[2]] for one in stages["items"]["anyOf"]]
    names = {kind["properties"]["name"]["const"] for kind in kinds}
    assert names == {*keys.variants("objective"), "constitution"}
    for kind in kinds:
        assert {"name", "stage", "data"} <= kind["properties"].keys()
        assert kind["additionalProperties"] is False
    for name in StageKeys.model_fields:
        assert explain(f"objective.{name}").startswith(f"objective.{name}")
    assert "Or a list of objectives" in explain("objective")
