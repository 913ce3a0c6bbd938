"""AdaLoRA's algebra and schedule, its training and allocation against PEFT's, its disk format, and resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_model, make_rows
from pydantic import ValidationError
from safetensors.torch import load_file
from toy import rows, write_base, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lora_cli import adapters, pipeline
from lora_cli.adapters import _peft
from lora_cli.adapters._adalora_budget import Schedule, budget, settle_schedule
from lora_cli.adapters.adalora import AdaLora, AdaLoraLinear
from lora_cli.adapters.lora import LoraLinear
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import AdaLoraAdapter
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.stages import train as train_stage
from lora_cli.types import Progress

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
STEPS, TINIT, TFINAL, DELTA_T = 30, 5, 8, 3


def injected(architecture: str = "llama", **settings: Any) -> tuple[PreTrainedModel, AdaLora]:
    """Return a model with AdaLoRA in it, planned for 30 steps."""
    values: dict[str, Any] = {"initial_rank": 6, "target_rank": 3, "alpha": 24.0, "seed": 2}
    values |= {"targets": TARGETS[architecture], "tinit": TINIT, "tfinal": TFINAL, "delta_t": DELTA_T}
    method = AdaLora(**values | settings)
    method.plan(STEPS)
    model = make_model(architecture)
    method.inject(model)
    return model, method


def train(model: PreTrainedModel, method: AdaLora, stop: int = STEPS) -> Iterator[tuple[int, float, float]]:
    """Train as the loop does; yield after each step its number, its loss and its penalty."""
    adapted, objective = AdaptedModel(model, method.layers), Sft(pad_id=0)
    optimizer = MasterAdamW(method.trainable(model))
    data = make_rows(4 * STEPS, seed=9)
    model.train()
    for step in range(stop):
        mine = list(enumerate(data[4 * step : 4 * step + 4]))
        batches = objective.micro_batches(adapted, mine, Progress(step, STEPS), tokens=60)
        units, total = sum(map(objective.units, batches)), 0.0
        for batch in batches:
            loss = objective.loss_sum(adapted, batch)[0] / units
            loss.backward()
            total += float(loss.detach())
        penalty = method.penalty()
        if penalty is not None:
            penalty.backward()
        optimizer.clip(optimizer.gradient_norm(), 1.0)
        optimizer.step(1e-2)
        method.after_step(optimizer, Progress(step, STEPS))
        optimizer.zero_grad()
        yield step, total, 0.0 if penalty is None else float(penalty.detach())
    model.eval()


def run(model: PreTrainedModel, method: AdaLora, stop: int = STEPS) -> None:
    """Train to a step."""
    for _ in train(model, method, stop):
        pass


def pefts(architecture: str = "llama", **settings: Any) -> Any:
    """Return a model with PEFT's AdaLoRA of the same settings."""
    values: dict[str, Any] = {"init_r": 6, "target_r": 3, "lora_alpha": 24, "total_step": STEPS}
    values |= {"tinit": TINIT, "tfinal": TFINAL, "deltaT": DELTA_T, "task_type": "CAUSAL_LM"}
    values |= {"target_modules": TARGETS[architecture]}
    return peft.get_peft_model(make_model(architecture), peft.AdaLoraConfig(**values | settings))


def train_pefts(model: Any, stop: int = STEPS) -> Iterator[tuple[int, float]]:
    """Train with PEFT's own penalty and allocator, called as its documentation says; yield the whole loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    data = make_rows(4 * STEPS, seed=9)
    model.train()
    for step in range(stop):
        mine = data[4 * step : 4 * step + 4]
        longest = max(len(row.input_ids) for row in mine)
        ids, labels = torch.zeros(4, longest, dtype=torch.long), torch.full((4, longest), -100)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(mine):
            size = len(row.input_ids)
            ids[i, :size], mask[i, :size] = torch.from_numpy(row.input_ids), 1
            labels[i, :size] = torch.where(torch.from_numpy(row.trained), ids[i, :size], -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        yield step, float(loss.detach())
    model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits


def test_forward_is_the_papers_equation() -> None:
    """h = W x + b + s P diag(E) Q x (arXiv 2303.10512, section 3.1), computed by hand."""
    layer = AdaLoraLinear(torch.nn.Linear(5, 3), rank=2, alpha=6.0)
    for parameter in (layer.lora_A, layer.lora_E, layer.lora_B):
        torch.nn.init.normal_(parameter)
    x = torch.randn(4, 5)
    update = layer.lora_B @ torch.diag(layer.lora_E[:, 0]) @ layer.lora_A * (6.0 / (2 + 1e-5))
    torch.testing.assert_close(layer(x), layer.base(x) + x @ update.T)


def test_it_starts_as_pefts() -> None:
    """E is zero and A and B have PEFT's spread, 0.02, in every layer; PEFT's own layers show the same."""
    _, ours = injected(initial_rank=64, target_rank=64)
    theirs = pefts(init_r=64, target_r=64)
    for path, layer in ours.layers.items():
        module = theirs.get_submodule(f"base_model.model.{path}")
        assert not layer.lora_E.any()
        assert not module.lora_E["default"].any()
        for name in ("lora_A", "lora_B"):
            assert abs(float(getattr(layer, name).detach().std()) / 0.02 - 1) < 0.1
            assert abs(float(getattr(module, name)["default"].detach().std()) / 0.02 - 1) < 0.1


def test_penalty_is_pefts_and_the_papers_gram_matrices(architecture: str) -> None:
    """The penalty is what PEFT adds to its loss, and half the mean of ||Q Q' - I|| and ||P' P - I|| by hand."""
    model, method = injected(architecture)
    other = pefts(architecture)
    grams = []
    for path, layer in method.layers.items():
        module = other.get_submodule(f"base_model.model.{path}")
        with torch.no_grad():
            for name in ("lora_A", "lora_B"):
                torch.nn.init.normal_(getattr(layer, name), std=0.3)
                getattr(module, name)["default"].copy_(getattr(layer, name))
        grams += [layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B]
    by_hand = 0.5 * sum((gram - torch.eye(6)).norm() for gram in grams) / len(grams)
    ids = torch.arange(1, 41).view(2, 20)
    theirs = other(input_ids=ids, labels=ids).loss - model(input_ids=ids, labels=ids).loss
    penalty = method.penalty()
    assert penalty is not None
    assert penalty.dim() == 0
    assert float(penalty) == pytest.approx(float(theirs), rel=1e-5)
    assert float(penalty) == pytest.approx(float(by_hand), rel=1e-6)
    assert injected(architecture, orthogonal_weight=0.0)[1].penalty() is None


@pytest.mark.parametrize("delta_t", [1, 3])
def test_training_and_allocation_equal_pefts(delta_t: int) -> None:
    """30 steps follow PEFT with its penalty and allocator: loss to 1e-4 at every step, the same ranks at the end."""
    model, method = injected(delta_t=delta_t)
    other = pefts(deltaT=delta_t)
    with torch.no_grad():
        for path, layer in method.layers.items():
            module = other.get_submodule(f"base_model.model.{path}")
            module.lora_A["default"].copy_(layer.lora_A)
            module.lora_B["default"].copy_(layer.lora_B)
    for (step, loss, penalty), (_, theirs) in zip(train(model, method), train_pefts(other), strict=True):
        assert abs(loss + penalty - theirs) / theirs <= 1e-4, f"step {step}: {loss + penalty} and {theirs}"
        pattern = other.peft_config["default"].rank_pattern
        if pattern is not None:
            ours = {f"{path}.lora_E.default": layer.kept.tolist() for path, layer in method.layers.items()}
            assert ours == pattern, f"step {step}"
    assert len({tuple(layer.kept.tolist()) for layer in method.layers.values()}) > 1
    peft.get_peft_model_state_dict(other)  # takes the adapter's name out of the pattern, as saving does
    assert method.disk_config()["rank_pattern"] == other.peft_config["default"].rank_pattern


def test_budget_is_pefts() -> None:
    """The budget at every step of a run, and whether it is applied, are those of PEFT's allocator."""
    model = pefts()
    theirs, count = model.base_model.rankallocator, 6
    schedule = Schedule(STEPS, TINIT, TFINAL, DELTA_T)
    for step in range(STEPS):
        expected, _ = theirs.budget_schedule(step)
        assert budget(step, schedule, 6 * count, 3 * count) == expected
    assert budget(STEPS - TFINAL, schedule, 6 * count, 3 * count) == 3 * count


@pytest.mark.parametrize("architecture_weight", [("llama", 0.5), ("gpt2", 0.0)])
def test_final_ranks_are_reached_exactly(architecture_weight: tuple[str, float]) -> None:
    """At the end the ranks sum to the budget, pruned entries are zero, and the report names every layer's rank."""
    architecture, weight = architecture_weight
    model, method = injected(architecture, orthogonal_weight=weight)
    run(model, method)
    masks = [layer.kept for layer in method.layers.values() if layer.kept is not None]
    assert sum(int(mask.sum()) for mask in masks) == 3 * len(method.layers)
    for layer, mask in zip(method.layers.values(), masks, strict=True):
        assert not layer.lora_E[~mask].any()
        assert layer.lora_E[mask].all()
    lines = method.report()
    assert "mean rank 3 " in lines[0]
    ranks = [int(rank) for line in lines[1:] for rank in line.split("rank ")[1].split()]
    assert sorted(ranks) == sorted(int(mask.sum()) for mask in masks)


def test_equal_scores_meet_the_budget() -> None:
    """Where no gradient has come all scores are equal, and still exactly the budget stays."""
    model, method = injected()
    optimizer = MasterAdamW(method.trainable(model))
    for step in range(STEPS):
        optimizer.gradients()
        method.after_step(optimizer, Progress(step, STEPS))
    assert sum(int(layer.kept.sum()) for layer in method.layers.values()) == 3 * len(method.layers)


@pytest.mark.parametrize("total", [2, 3, 10, 187, 5000])
def test_derived_schedules_fit(total: int) -> None:
    """A schedule derived from the run leaves room to prune, with 100 updates or one a step; PEFT accepts it."""
    schedule = settle_schedule(total, None, None, None)
    peft.AdaLoraConfig(total_step=total, tinit=schedule.tinit, tfinal=schedule.tfinal)
    assert schedule.tfinal >= 1
    updates = (schedule.end - schedule.tinit) / schedule.delta_t
    assert updates >= min(100, schedule.end - schedule.tinit)
    assert settle_schedule(total, None, total - 1, None).tinit == 0
    assert settle_schedule(total, total - 2, None, None).tfinal == 1


@pytest.mark.parametrize(
    ("total", "settings", "message"),
    [
        (30, {"tinit": 20, "tfinal": 10}, r"adapter.tinit: tinit 20 \+ tfinal 10 leave none of the run's 30"),
        (30, {"tinit": 30}, r"adapter.tinit: tinit 30 \+ tfinal 1 "),
        (30, {"tfinal": 30}, r"adapter.tfinal: tinit 0 \+ tfinal 30 "),
        (1, {}, "the run's 1 steps"),
        (30, {"delta_t": 20}, "adapter.delta_t: 20 steps .* only 18 of the run's 30"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(total: int, settings: dict[str, int], message: str) -> None:
    """A schedule longer than the run is refused with the rule and the numbers."""
    method = AdaLora(initial_rank=6, target_rank=3, alpha=8.0, **settings)
    with pytest.raises(InputError, match=message):
        method.plan(total)


def test_ranks_that_would_grow_are_refused() -> None:
    """target_rank above initial_rank is refused in the recipe; equal ranks train, and prune nothing."""
    with pytest.raises(ValidationError, match=r"above adapter\.initial_rank 4"):
        AdaLoraAdapter(initial_rank=4, target_rank=5)
    model, method = injected(target_rank=6)
    run(model, method)
    assert all(bool(layer.kept.all()) for layer in method.layers.values())


STATES = {"never pruned": 3, "mid-schedule": 14, "at the end": STEPS}


@pytest.mark.parametrize("state", STATES)
def test_peft_reads_ours(tmp_path: Path, architecture: str, state: str) -> None:
    """PEFT loads our file with an equal key set and logits to 1e-5, unpruned, between two updates, and pruned."""
    model, method = injected(architecture)
    run(model, method, STATES[state])
    model.eval()
    _peft.write(tmp_path, method, base_name="base", revision=None)
    loaded = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
    assert float((logits(loaded) - logits(model)).abs().max()) <= 1e-5
    assert float((logits(model) - logits(make_model(architecture))).abs().max()) > 0.01
    assert set(peft.get_peft_model_state_dict(loaded)) == set(load_file(tmp_path / _peft.TENSOR_FILE))
    reread = make_model(architecture)
    again = adapters.load(tmp_path, reread)
    assert float((logits(reread) - logits(model)).abs().max()) <= 1e-5
    written = json.loads((tmp_path / _peft.CONFIG_FILE).read_text())
    assert {key: written[key] for key in again.disk_config()} == again.disk_config()


@pytest.mark.parametrize("state", STATES)
def test_ours_reads_pefts(tmp_path: Path, architecture: str, state: str) -> None:
    """We load PEFT's file with logits to 1e-5, unpruned and pruned, and would write the same keys and settings."""
    model = pefts(architecture, deltaT=1)
    for _ in train_pefts(model, STATES[state]):
        pass
    model.eval()
    model.save_pretrained(tmp_path)
    reread = make_model(architecture)
    method = adapters.load(tmp_path, reread)
    assert float((logits(reread) - logits(model)).abs().max()) <= 1e-5
    tensors = load_file(tmp_path / _peft.TENSOR_FILE)
    assert {name: tensor.shape for name, tensor in _peft.places(method).items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    config = json.loads((tmp_path / _peft.CONFIG_FILE).read_text())
    for key, value in method.disk_config().items():
        assert config[key] == value, key


def test_a_layer_of_rank_0_goes_through_peft(tmp_path: Path) -> None:
    """A layer that lost every triplet is written, and read by PEFT and by us, as one that adds nothing."""
    model, method = injected()
    run(model, method)
    layer = next(iter(method.layers.values()))
    assert layer.kept is not None
    layer.kept.zero_()
    layer.prune()
    model.eval()
    _peft.write(tmp_path, method, base_name="base", revision=None)
    loaded = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    reread = make_model("llama")
    adapters.load(tmp_path, reread)
    for other in (loaded, reread):
        assert float((logits(other) - logits(model)).abs().max()) <= 1e-5


PATTERN = "rank_pattern"
FIRST = "model.layers.0.self_attn.q_proj.lora_E"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({PATTERN: {"model.layers.7.self_attn.q_proj.lora_E": [True] * 6}}, "names model.layers.7.self_attn"),
        ({PATTERN: {FIRST: [True] * 5}}, "lists of init_r"),
        ({PATTERN: {FIRST: [1] * 6}}, "lists of init_r"),
        ({PATTERN: {FIRST: [True] + [False] * 5}}, "the layer needs (1,"),
        ({"init_r": 0}, "init_r is 0"),
        ({"total_step": None}, "total_step is None"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"use_dora": True}, "use_dora is True"),
    ],
)
def test_a_faulty_adapter_is_refused(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    """Settings that do not fit the tensors, the model or the method are refused and named."""
    _, method = injected()
    _peft.write(tmp_path, method, base_name="base", revision=None)
    path = tmp_path / _peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(InputError) as caught:
        adapters.load(tmp_path, make_model("llama"))
    assert message in str(caught.value)


def test_plain_factors_are_the_whole_update() -> None:
    """B A of the plain factors is the merged update to float32 rounding, in AdaLoRA and in LoRA, at the final rank."""
    model, method = injected()
    run(model, method)
    lora = LoraLinear(torch.nn.Linear(5, 3), rank=2, alpha=6.0)
    torch.nn.init.normal_(lora.lora_B)
    torch.nn.init.normal_(lora.lora_A)
    for layer in (*method.layers.values(), lora):
        a, b = layer.plain_factors()
        rank = 2 if isinstance(layer, LoraLinear) else int(layer.kept.sum())
        assert a.shape == (rank, layer.in_features)
        assert b.shape == (layer.out_features, rank)
        update = layer.merged_weight() - layer.base_weight()
        torch.testing.assert_close(b @ a, update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("total", [18, 60])
def test_a_run_that_goes_on_with_other_steps_ends_at_its_target(total: int) -> None:
    """Continued after step 16 of 30 with fewer steps or with more, a run still ends with the budget's ranks."""
    model, method = injected()
    run(model, method, 16)
    state = method.state_dict()
    other_model, other = injected()
    other.load_state_dict(state)
    other.plan(total)
    optimizer = MasterAdamW(other.trainable(other_model))
    for step in range(16, total):
        optimizer.gradients()
        other.after_step(optimizer, Progress(step, total))
    assert sum(int(layer.kept.sum()) for layer in other.layers.values()) == 3 * len(other.layers)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder that no test changes."""
    return write_base(tmp_path_factory.mktemp("models") / "base")


BLOCK = {"method": "adalora", "initial_rank": 4, "target_rank": 2, "alpha": 32.0, "dropout": 0.1}
BLOCK |= {"tinit": 2, "tfinal": 3, "delta_t": 2}


def test_a_run_resumed_anywhere_equals_the_uninterrupted_one(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Continued from before tinit, at and between budget updates, at the last one and after it: the same bits."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    path = write_recipe(
        tmp_path / "job", base, adapter=BLOCK, train__save_every=1, train__keep_checkpoints=99
    )
    recipe, run = load_recipe(path), tmp_path / "job" / "run"
    pipeline.train(recipe)
    assert "adalora: mean rank 2 (from 4, target 2)" in capsys.readouterr().out
    straight, whole = load_file(run / "adapter" / _peft.TENSOR_FILE), tmp_path / "whole"
    config = (run / "adapter" / _peft.CONFIG_FILE).read_text()
    shutil.copytree(run, whole)
    for step in (1, 5, 6, 8, 9):  # budget updates follow the steps that end as number 5, 7 and 8
        shutil.rmtree(run)
        shutil.copytree(whole, run, ignore=shutil.ignore_patterns("summary.json", "adapter"))
        for later in range(step + 1, 11):
            shutil.rmtree(run / "checkpoints" / f"step-{later}")
        pipeline.train(recipe, resume=True)
        parts = load_file(run / "adapter" / _peft.TENSOR_FILE)
        assert parts.keys() == straight.keys()
        assert all(torch.equal(value, parts[key]) for key, value in straight.items()), step
        assert (run / "adapter" / _peft.CONFIG_FILE).read_text() == config


def test_best_weights_come_with_their_masks(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a checkpoint before pruning are exported at full rank, also when later steps have pruned."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    losses = iter([3.0, 2.0, 1.0, *range(4, 11)])
    monkeypatch.setattr(
        train_stage, "heldout_sums", lambda *_, **__: {"loss": float(next(losses)), "units": 1.0}
    )
    changes = {"train__eval_every": 1, "train__final_weights": "best"}
    summary = pipeline.train(load_recipe(write_recipe(tmp_path / "job", base, adapter=BLOCK, **changes)))
    assert summary["best_step"] == 3
    adapter = tmp_path / "job" / "run" / "adapter"
    assert json.loads((adapter / _peft.CONFIG_FILE).read_text())["rank_pattern"] is None
    names = [name for name in load_file(adapter / _peft.TENSOR_FILE) if name.endswith("lora_E")]
    assert all(load_file(adapter / _peft.TENSOR_FILE)[name].shape == (4, 1) for name in names)


def test_the_penalty_is_trained_but_not_reported(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The penalty moves gradient and weights; the first loss is the base's own, the last one transformers' own."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    first, tensors, summary = {}, {}, {}
    for weight in (0.0, 5.0):
        folder = tmp_path / f"w{weight}"
        block = BLOCK | {"orthogonal_weight": weight, "dropout": 0.0}
        recipe = load_recipe(write_recipe(folder, base, adapter=block, export__formats=["peft", "merged"]))
        summary[weight] = pipeline.train(recipe)
        first[weight] = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
        tensors[weight] = load_file(folder / "run" / "adapter" / _peft.TENSOR_FILE)
    assert first[0.0]["loss"] == first[5.0]["loss"]
    assert first[5.0]["grad_norm"] > first[0.0]["grad_norm"]
    assert summary[5.0]["eval"]["base"] == summary[0.0]["eval"]["base"]
    names = [name for name in tensors[0.0] if name.endswith("lora_A")]
    assert any(not torch.equal(tensors[0.0][name], tensors[5.0][name]) for name in names)

    merged = tmp_path / "w5.0" / "run" / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    total, count = 0.0, 0
    for row in rows(11):
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(row["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(head) + tail])
            loss = model.eval()(input_ids=torch.tensor([head + tail]), labels=labels).loss
        total, count = total + float(loss) * len(tail), count + len(tail)
    assert summary[5.0]["eval"]["tuned"]["loss"] == pytest.approx(total / count, rel=1e-5)
