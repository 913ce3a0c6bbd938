"""Objectives over pairs: their losses, their gradients whatever the batches, and whole runs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reward_models
import torch
from contracts.test_adapters import SETTINGS
from small import make_model
from toy import pairs, write_recipe, write_rows
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from lora_cli import adapters, objectives, pipeline
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.packing import keep_apart
from lora_cli.objectives._answers import Answers
from lora_cli.objectives._preference import PreferenceObjective
from lora_cli.recipe import objective_blocks as blocks
from lora_cli.recipe.load import load_recipe
from lora_cli.types import Example, PairExample, Progress

FORMS: dict[str, Any] = {
    "dpo": blocks.DpoObjective(),
    "dpo-smoothed": blocks.DpoObjective(label_smoothing=0.2),
    "dpo-hinge": blocks.DpoObjective(loss="hinge"),
    "dpo-ipo": blocks.DpoObjective(loss="ipo"),
    "dpo-normalized": blocks.DpoObjective(length_normalized=True),
    "orpo": blocks.OrpoObjective(),
    "simpo": blocks.SimpoObjective(),
    "cpo": blocks.CpoObjective(),
}


def objective(form: str) -> PreferenceObjective:
    """Return an objective over pairs."""
    made = objectives.build(FORMS[form], pad_id=0)
    assert isinstance(made, PreferenceObjective)
    return made


def answers(logps: list[float], lengths: list[int]) -> Answers:
    """Return what a model gives answers, chosen and rejected in turn."""
    return Answers(torch.tensor(logps, dtype=torch.float64), torch.tensor(lengths, dtype=torch.float64))


# Two pairs: log-probabilities of (chosen, rejected) under the model and the one it began with, and their tokens.
POLICY, REFERENCE = (
    answers([-3.0, -5.0, -7.5, -4.0], [3, 2, 5, 4]),
    answers([-4.0, -4.5, -6.0, -4.5], [3, 2, 5, 4]),
)


def sigmoid_loss(x: float) -> float:
    """Return -log sigmoid(x)."""
    return math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("form", "expected"),
    [  # margins over the reference: 1.0 + 0.5 = 1.5, and -1.5 - 0.5 = -2.0
        ("dpo", [sigmoid_loss(0.15), sigmoid_loss(-0.2)]),
        ("dpo-smoothed", [0.8 * sigmoid_loss(x) + 0.2 * sigmoid_loss(-x) for x in (0.15, -0.2)]),
        ("dpo-hinge", [1 - 0.15, 1 + 0.2]),
        ("dpo-ipo", [(1 / 3 + 0.5 / 2 - 5) ** 2, (-1.5 / 5 - 0.5 / 4 - 5) ** 2]),
        ("dpo-normalized", [sigmoid_loss(0.1 * (1 / 3 + 0.5 / 2)), sigmoid_loss(0.1 * (-1.5 / 5 - 0.5 / 4))]),
    ],
)
def test_dpo_is_its_equation(form: str, expected: list[float]) -> None:
    """Each of DPO's losses is what its equation gives by hand."""
    judged = objective(form).judge(POLICY, REFERENCE)
    torch.testing.assert_close(judged.losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def random_answers(number: int, seed: int = 0) -> Answers:
    """Return answers of plausible log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (2 * number,), generator=generator).double()
    return Answers(-lengths * torch.rand(2 * number, generator=generator).double() * 3 - 1e-3, lengths)


def test_orpo_is_trls() -> None:
    """ORPO's losses are TRL's odds-ratio loss and the mean negative log-likelihood, on random log-probabilities."""
    policy = random_answers(50)
    chosen, rejected = policy.pairs(policy.means)
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    ratio = ORPOTrainer.odds_ratio_loss(trainer, chosen.float(), rejected.float())[0]
    judged = objective("orpo").judge(policy, None)
    torch.testing.assert_close(judged.losses, (-chosen - ratio.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo_and_simpo_are_trls(smoothing: float) -> None:
    """CPO's and SimPO's losses are TRL's on random log-probabilities; CPO's second term is added apart there."""
    policy = random_answers(50)
    trainer = SimpleNamespace(
        beta=0.1,
        alpha=0.0,
        label_smoothing=smoothing,
        loss_type="sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs = CPOTrainer.cpo_loss(trainer, *policy.pairs(policy.logps))[0]
    made = objectives.build(blocks.CpoObjective(label_smoothing=smoothing, sft_weight=0.5), pad_id=0)
    assert isinstance(made, PreferenceObjective)
    mine = made.judge(policy, None).losses + 0.5 * policy.pairs(policy.means)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    trainer.beta, trainer.loss_type, trainer.simpo_gamma, trainer.label_smoothing = 2.0, "simpo", 1.0, 0.0
    theirs = CPOTrainer.cpo_loss(trainer, *policy.pairs(policy.means))[0]
    torch.testing.assert_close(objective("simpo").judge(policy, None).losses, theirs, rtol=1e-6, atol=1e-9)


def pair_examples(number: int, seed: int = 0) -> list[PairExample]:
    """Return pairs with a prompt in common and answers of unequal lengths."""
    draw = np.random.Generator(np.random.PCG64(seed))
    made = []
    for _ in range(number):
        prompt = draw.integers(1, 96, int(draw.integers(2, 12)))
        both = []
        for _ in range(2):
            ids = np.concatenate([prompt, draw.integers(1, 96, int(draw.integers(1, 20)))]).astype(np.int32)
            both.append(Example(ids, np.arange(len(ids)) >= len(prompt)))
        made.append(PairExample(both[0], both[1], math.nan))
    return made


def gradients(
    form: str, tokens: int, *, packs: bool, method_name: str = "lora"
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss of six pairs, and every gradient, in passes of at most so many tokens."""
    model = make_model("llama")
    method = adapters.build(SETTINGS[method_name], seed=3)
    method.plan(3)
    method.inject(model)
    frozen = {} if method.layers else {n: p.detach().clone() for n, p in method.trainable(model).items()}
    trained = method.trainable(model)
    torch.manual_seed(1)
    with torch.no_grad():  # away from the start, where DPO's margins are zero
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    if packs:
        assert keep_apart(model) is None
    adapted, made = AdaptedModel(model, method.layers, frozen, packs=packs), objective(form)
    rows = list(enumerate(pair_examples(6)))
    model.train()
    total = 0.0
    batches = made.micro_batches(adapted, rows, Progress(0, 1), tokens=tokens)
    assert sorted(itertools.chain.from_iterable(batch.rows for batch in batches)) == list(range(6))
    for batch in batches:
        loss, _ = made.loss_sum(adapted, batch)
        (loss / 6).backward()
        total += float(loss.detach()) / 6
    return total, {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_does_not_depend_on_the_batches(form: str) -> None:
    """One pair a pass, all in one, padded and packed: loss and gradients agree to 1e-5 of their size."""
    loss, expected = gradients(form, 10_000, packs=False)
    for tokens, packs in ((1, False), (1, True), (10_000, True), (90, True)):
        other, found = gradients(form, tokens, packs=packs)
        assert other == pytest.approx(loss, rel=1e-5)
        for name, value in expected.items():
            assert float((found[name] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-9, (
                name,
                tokens,
                packs,
            )


@pytest.mark.parametrize("name", ["dpo", "kto", "reward"])
@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_every_method_learns_a_preference(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, method: str, name: str
) -> None:
    """Under every method the first loss is that of no preference, and held-out accuracy rises; of a reward model PEFT
    or transformers read the same scores."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    train, held = (write_rows(tmp_path / f"{split}.jsonl", pairs(n)) for split, n in (("p", 40), ("h", 16)))
    settings = SETTINGS[method].model_dump(exclude_none=True)
    rate = {"full": 1e-3, "vera": 5e-2}.get(method, 1e-2)
    block = {"name": name, "beta": 0.5} if name == "kto" else {"name": name}
    path = write_recipe(
        tmp_path, base, objective=block, data__train=str(train), data__eval=str(held),
        adapter=settings, train__learning_rate=rate, train__max_steps=12, train__batch_size=16 if name == "kto" else 8,
    )  # fmt: skip
    recipe = load_recipe(path)
    scores = pipeline.train(recipe)["eval"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    start = 0.5 if name == "kto" else math.log(2)
    accuracy = "label_accuracy" if name == "kto" else "preference_accuracy"
    assert first["loss"] == pytest.approx(start, rel=1e-6)
    assert first.get("reward_margin", 0.0) == pytest.approx(0.0, abs=1e-6)
    assert scores["base"][accuracy] == 0.5
    assert scores["base"]["loss"] == pytest.approx(start, rel=1e-6)
    assert scores["tuned"][accuracy] > 0.8
    assert scores["tuned"]["loss"] < (0.45 if name == "kto" else 0.6)
    if name != "reward":
        return
    rows, pad_id = reward_models.heldout(recipe)
    if method == "full":
        theirs = reward_models.read_by_transformers(tmp_path / "run" / "merged")
    else:
        theirs = reward_models.read_by_peft(str(base), tmp_path / "run" / "adapter", pad_id)
    chosen, rejected = reward_models.scores(theirs, rows, pad_id).T
    # PEFT stands on the full base here, qlora was trained on a quantized one.
    apart = 0.5 if method == "qlora" else 1e-5
    assert chosen.mean() == pytest.approx(scores["tuned"]["reward_chosen"], abs=apart)
    assert rejected.mean() == pytest.approx(scores["tuned"]["reward_rejected"], abs=apart)


def test_bfloat16_begins_at_ln_2_too(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the model and its reference round alike in training: the first loss is ln 2, its margins are zero."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    data = str(write_rows(tmp_path / "p.jsonl", pairs(40)))
    for packing in (True, False):
        path = write_recipe(
            tmp_path / str(packing), base, objective={"name": "dpo"}, data__train=data, data__eval=None,
            data__packing=packing, model__dtype="bfloat16", train__max_steps=1,
        )  # fmt: skip
        pipeline.train(load_recipe(path))
        lines = (tmp_path / str(packing) / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert json.loads(lines[0])["reward_margin"] == 0.0


def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run over pairs that goes on from a checkpoint ends in the same bytes."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    data = str(write_rows(tmp_path / "p.jsonl", pairs(40)))
    weights = []
    for name, stop in (("whole", None), ("halves", 3)):
        path = write_recipe(
            tmp_path / name, base, objective={"name": "dpo"}, data__train=data, data__eval=None, train__max_steps=6,
            train__save_every=1, train__keep_checkpoints=10,
        )  # fmt: skip
        run = tmp_path / name / "run"
        pipeline.train(load_recipe(path))
        if stop is not None:
            (run / "summary.json").unlink()
            for later in range(stop + 1, 7):
                for file in sorted((run / f"checkpoints/step-{later}").rglob("*"), reverse=True):
                    file.unlink()
                (run / f"checkpoints/step-{later}").rmdir()
            pipeline.train(load_recipe(path))
        weights.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_rows_of_another_kind_are_refused(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs for sft, conversations for dpo, pairs that would be split: one line that says what to give."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    data = str(write_rows(tmp_path / "p.jsonl", pairs(8)))
    for changes, message in (
        ({"data__train": data, "data__eval": None}, "cannot learn from"),
        ({"objective": {"name": "dpo"}, "data__eval": None}, "pairs of a chosen and a rejected answer"),
        (
            {
                "objective": {"name": "dpo"},
                "data__train": data,
                "data__eval": None,
                "data__overlong": "split",
            },
            "which data.overlong split would take apart",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.train(load_recipe(write_recipe(tmp_path / "r", base, **changes)))
