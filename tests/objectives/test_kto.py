"""KTO: its loss, the divergence of a whole step, its gradients whatever the batches, and whole runs."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run_here
from contracts.test_adapters import SETTINGS
from small import make_model
from test_processes import in_two_processes
from toy import pairs, rows, write_recipe, write_rows
from trl.trainer.kto_trainer import KTOTrainer

from lora_cli import adapters, objectives, pipeline
from lora_cli.errors import ResourceError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.packing import keep_apart
from lora_cli.objectives import kto
from lora_cli.objectives._answers import Answers, answers_of
from lora_cli.objectives.kto import Kto, LabelledBatch, kto_losses
from lora_cli.recipe import objective_blocks as blocks
from lora_cli.recipe.load import load_recipe
from lora_cli.types import Batch, Example, LabelledExample, Progress


def labelled(number: int) -> list[dict[str, Any]]:
    """Return prompts with an answer that is right in two of three rows, and a label that says so."""
    found = []
    for index, (row, pair) in enumerate(zip(rows(number), pairs(number), strict=True)):
        wanted = index % 3 != 0
        answer = row["completion"] if wanted else pair["rejected"]
        found.append({"prompt": row["prompt"], "completion": answer, "label": wanted})
    return found


def test_by_hand() -> None:
    """One wanted answer of three tokens and one unwanted one: the loss is what the equation gives."""
    gains = torch.tensor([-0.5 + 0.25 + 1.0, -1.0], dtype=torch.float64)  # sums of the tokens' log-ratios
    found = kto_losses(
        gains, torch.tensor([True, False]), 0.3, beta=0.5, desirable_weight=1.5, undesirable_weight=2.0
    )
    expected = [
        1.5 * (1 - 1 / (1 + math.exp(-0.5 * (0.75 - 0.3)))),
        2.0 * (1 - 1 / (1 + math.exp(-0.5 * 1.3))),
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def trl_loss(
    logps: torch.Tensor,
    reference: torch.Tensor,
    others: torch.Tensor,
    wanted: torch.Tensor,
    weights: list[float],
) -> float:
    """Return what TRL's trainer makes of log-probabilities by token, (A, T), and of those of mismatched answers."""
    same: Any = SimpleNamespace(gather_for_metrics=lambda value: value, device="cpu")
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, precompute_ref_logps=True,
        calculate_KL=True, loss_type="kto", beta=0.1, desirable_weight=weights[0], undesirable_weight=weights[1],
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda model, batch: others[0],
    )  # fmt: skip
    ids = torch.ones(len(logps), logps.shape[1] + 1, dtype=torch.int64)
    output = SimpleNamespace(
        log_probs=logps, entropy=torch.zeros_like(logps), mean_logits=torch.zeros_like(logps)
    )
    inputs = {
        "input_ids": ids, "attention_mask": ids, "completion_mask": ids, "label": wanted,
        "ref_logps": reference, "ref_KL_logps": others[1],
    }  # fmt: skip
    return float(KTOTrainer._compute_loss(trainer, lambda **_: output, inputs, return_outputs=False))


@pytest.mark.parametrize("seed", range(4))
def test_it_is_trls(seed: int) -> None:
    """On random log-probabilities the mean loss is that of TRL's trainer, with a divergence above and below zero."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(9, 7, generator=generator, dtype=torch.float64)
    reference = -10 * torch.rand(9, generator=generator, dtype=torch.float64)
    others = -10 * torch.rand(2, 9, generator=generator, dtype=torch.float64)
    others[0] += 8.0 * (seed % 2) - 4.0
    wanted = torch.rand(9, generator=generator) > 0.4
    z0 = max(0.0, float((others[0] - others[1]).mean()))
    assert (z0 > 0) is bool(seed % 2)
    mine = kto_losses(
        logps.sum(-1) - reference, wanted, z0, beta=0.1, desirable_weight=1.3, undesirable_weight=0.7
    )
    theirs = trl_loss(logps, reference, others, wanted, [1.3, 0.7])
    assert float(mine.mean()) == pytest.approx(theirs, abs=1e-9)


def examples(number: int, seed: int = 0) -> list[LabelledExample]:
    """Return answers of unequal lengths, wanted or not."""
    draw = np.random.Generator(np.random.PCG64(seed))
    made = []
    for place in range(number):
        lengths = int(draw.integers(2, 12)), int(draw.integers(1, 20))
        ids = draw.integers(1, 96, sum(lengths)).astype(np.int32)
        made.append(LabelledExample(Example(ids, np.arange(len(ids)) >= lengths[0]), place % 3 != 0))
    return made


def moved(packs: bool) -> tuple[AdaptedModel, dict[str, torch.nn.Parameter]]:
    """Return a model whose adapter is away from its start, and what is trained of it."""
    model = make_model("llama")
    method = adapters.build(SETTINGS["lora"], seed=3)
    method.inject(model)
    trained = method.trainable(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    if packs:
        assert keep_apart(model) is None
    return AdaptedModel(model, method.layers, packs=packs), trained


def objective() -> Kto:
    """Return the objective with weights that tell the labels apart."""
    made = objectives.build(blocks.KtoObjective(desirable_weight=1.5, undesirable_weight=0.5), pad_id=0)
    assert isinstance(made, Kto)
    return made


def test_the_divergence_is_that_of_mismatched_rows() -> None:
    """z0 of a step is the mean gain of each prompt with the answer of the row before, as transformers computes it."""
    model, _ = moved(packs=False)
    chosen = examples(5)
    (batch,) = objective().micro_batches(model, list(enumerate(chosen)), Progress(0, 1), tokens=10_000)
    gains = []
    for place, row in enumerate(chosen):
        prompt = row.example.input_ids[~row.example.trained]
        other = chosen[place - 1].example
        answer = other.input_ids[other.trained]
        ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]

        def logp(ids: torch.Tensor = ids, start: int = len(prompt)) -> float:
            logits = model.model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            return float(logits.gather(-1, ids[0, start:, None]).sum())

        with torch.no_grad():
            own = logp()
            with model.reference():
                gains.append(own - logp())
    assert isinstance(batch, LabelledBatch)
    expected = sum(gains) / len(gains)
    assert abs(expected) > 0.01
    assert batch.divergence == pytest.approx(max(0.0, expected), abs=1e-4)


def gradients(tokens: int, *, packs: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss of seven answers, and every gradient, in passes of at most so many tokens."""
    model, trained = moved(packs)
    made, chosen = objective(), list(enumerate(examples(7)))
    model.model.train()
    batches = made.micro_batches(model, chosen, Progress(0, 1), tokens=tokens)
    assert sorted(itertools.chain.from_iterable(batch.rows for batch in batches)) == list(range(7))
    total = 0.0
    for batch in batches:
        loss, _ = made.loss_sum(model, batch)
        (loss / 7).backward()
        total += float(loss.detach()) / 7
    return total, {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


def test_the_gradient_does_not_depend_on_the_batches() -> None:
    """One answer a pass, all in one, padded and packed: loss and gradients agree to 1e-5 of their size."""
    loss, expected = gradients(10_000, packs=False)
    for tokens, packs in ((1, False), (1, True), (10_000, True), (60, True)):
        other, found = gradients(tokens, packs=packs)
        assert other == pytest.approx(loss, rel=1e-5)
        for name, value in expected.items():
            assert float((found[name] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-9, (name, tokens)


def test_a_pass_that_does_not_fit_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergence is the same in smaller passes, where memory wants them; one row that does not fit is one line."""
    model, _ = moved(packs=False)
    chosen, room = list(enumerate(examples(6))), [10_000]

    def limited(model: AdaptedModel, batch: Batch) -> Answers:
        if batch.input_ids.numel() > room[0]:
            raise torch.OutOfMemoryError
        return answers_of(model, batch)

    monkeypatch.setattr(kto, "answers_of", limited)
    found = []
    for room[0] in (10_000, 60):
        batch = objective().micro_batches(model, chosen, Progress(0, 1), tokens=10_000)[0]
        assert isinstance(batch, LabelledBatch)
        found.append(batch.divergence)
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    room[0] = 5
    with pytest.raises(ResourceError, match="out of memory: a prompt with the answer to another"):
        objective().micro_batches(model, chosen, Progress(0, 1), tokens=10_000)


def told(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, without its speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.mark.usefixtures("own_cache")
def test_labelled_rows_are_learned(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first loss is 0.5 and no divergence, rewards move apart, held-out answers come on their side; so says
    lora-eval."""
    train, held = (write_rows(tmp_path / f"{name}.jsonl", labelled(n)) for name, n in (("p", 42), ("h", 15)))
    path = write_recipe(
        tmp_path, base, objective={"name": "kto"}, data__train=str(train), data__eval=str(held),
        train__learning_rate=1e-2, train__max_steps=20,
    )  # fmt: skip
    scores = pipeline.train(load_recipe(path))["eval"]
    first = next(line for line in told(tmp_path / "run") if "loss" in line)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert first["kl"] == 0.0
    assert scores["base"]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert scores["base"]["label_accuracy"] == 0.5
    assert scores["tuned"]["label_accuracy"] > 0.8
    assert scores["tuned"]["reward_margin"] > 0.1
    result = run_here(capsys, "eval", str(tmp_path / "run"), "--json")
    assert result.code == 0, result.errors
    found = json.loads(result.output[result.output.index("{") :])
    assert found["tuned"] == pytest.approx(scores["tuned"], abs=1e-6)


@pytest.mark.usefixtures("own_cache")
def test_two_processes_train_as_one(tmp_path: Path, base: Path) -> None:
    """Two processes have the losses, divergences and gradients of one, also in steps that they share unevenly."""
    data = [
        str(write_rows(tmp_path / "p.jsonl", pairs(6))),
        str(write_rows(tmp_path / "l.jsonl", labelled(7))),
    ]
    block = {"name": "kto", "desirable_weight": 3.0, "undesirable_weight": 0.1}
    sources = {"pairs": {"path": data[0]}, "labels": {"path": data[1]}}
    recipes = [
        write_recipe(
            tmp_path / name, base, objective=block, data={"sources": sources},
            train__max_steps=4, train__batch_size=7, train__learning_rate=5e-2,
        )
        for name in ("alone", "two")
    ]  # fmt: skip
    two = in_two_processes(recipes[1])
    assert two.returncode == 0, two.stderr
    pipeline.train(load_recipe(recipes[0]))
    alone, both = (told(path.parent / "run") for path in recipes)
    assert any(line["kl"] > 1e-3 for line in alone)
    for one, other in zip(alone, both, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_a_batch_of_one_is_refused(tmp_path: Path, base: Path) -> None:
    """With one answer a step there is no other answer to compare with."""
    path = write_recipe(tmp_path, base, objective={"name": "kto"}, train__batch_size=1)
    with pytest.raises(ValueError, match=r"train.batch_size: found 1, but kto compares"):
        load_recipe(path)
