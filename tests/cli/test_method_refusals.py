"""What a method cannot be asked for: exit 2 and one line with the key, what was found and the rule; nothing written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import run_here, run_process, snapshot
from toy import write_recipe

pytestmark = pytest.mark.reliability("malformed")
RANK = "(must be an integer from 1 to 4096)"
ALPHA = "(must be a number above 0 and at most 1000000)"
DROPOUT = "(must be a number of at least 0 and below 1)"
START = "(must be a number above 0 and at most 10)"
NO_LINEAR = "matches no linear layer of the model"
LINEARS = "its linear layers are named down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
NO_ROOM = "leave none of the run's 10 steps to lower the ranks (their sum must be below the number of steps"
NOT_FULL = "but full fine-tuning trains the weights themselves, and a step is far smaller than the distance"
LORA_LIKE = ["lora", "qlora", "dora", "relora"]

CASES: list[tuple[str, str]] = [
    # Ranks and scales that are none, of every method that has them
    *[(f"{method}, rank: 0", f"adapter.rank: found 0 {RANK}") for method in [*LORA_LIKE, "vera"]],
    *[(f"{method}, alpha: 0", f"adapter.alpha: found 0 {ALPHA}") for method in [*LORA_LIKE, "adalora"]],
    *[(f"{method}, alpha: .nan", f"adapter.alpha: found NaN {ALPHA}") for method in [*LORA_LIKE, "adalora"]],
    ("adalora, initial_rank: 0", f"adapter.initial_rank: found 0 {RANK}"),
    ("adalora, target_rank: 0", f"adapter.target_rank: found 0 {RANK}"),
    ("lora, rank: -3", f"adapter.rank: found -3 {RANK}"),
    ("lora, rank: .nan", f"adapter.rank: found NaN {RANK}"),
    ("lora, rank: 1.5", f"adapter.rank: found 1.5 {RANK}"),
    ("lora, rank: true", f"adapter.rank: found true {RANK}"),
    ("dora, rank: 4097", f"adapter.rank: found 4097 {RANK}"),
    ("relora, alpha: -1", f"adapter.alpha: found -1 {ALPHA}"),
    ("dora, alpha: .inf", f"adapter.alpha: found Infinity {ALPHA}"),
    ("lora, rank_pattern: {q_proj: 0}", f"adapter.rank_pattern.q_proj: found 0 {RANK}"),
    ("qlora, alpha_pattern: {q_proj: .nan}", f"adapter.alpha_pattern.q_proj: found NaN {ALPHA}"),
    ("lora, rank_pattern: {q_prj: 4}", "'q_prj' matches none of the adapted modules (did you mean q_proj?)"),
    ("lora, plus_ratio: 0", "adapter.plus_ratio: found 0 (must be a number above 0 and at most 1000)"),
    ("vera, dropout: -0.1", f"adapter.dropout: found -0.1 {DROPOUT}"),
    ("adalora, dropout: 1.0", f"adapter.dropout: found 1.0 {DROPOUT}"),
    ("relora, dropout: .nan", f"adapter.dropout: found NaN {DROPOUT}"),
    # Targets that match nothing, and what was meant
    *[(f"{method}, targets: [wq]", f"adapter.targets: 'wq' {NO_LINEAR} ({LINEARS})") for method in LORA_LIKE],
    ("dora, targets: [v_proj, q_prj]", f"adapter.targets: 'q_prj' {NO_LINEAR} (did you mean q_proj?)"),
    ("lora, targets: q_proj", f"'q_proj' {NO_LINEAR} (as a text it is a pattern for the whole path; write [q_proj] "),
    ("vera, targets: 'q_proj,v_proj'", "write [q_proj, v_proj] for module names)"),
    ("relora, targets: (q_proj|v_proj)", "write [q_proj, v_proj] for module names)"),
    ("adalora, targets: [attention, mlp]", "(write targets: attention, alone and not in a list, "),
    ("qlora, targets: [all-linear]", "(write targets: all-linear, alone and not in a list, "),
    ("lora, targets: all_linear", f"'all_linear' {NO_LINEAR} (did you mean all-linear?)"),
    ("dora, targets: []", "adapter.targets: found nothing (name at least one layer, or write all-linear)"),
    ("dora, targets: [q_proj, '']", f"adapter.targets: '' {NO_LINEAR} ({LINEARS})"),
    ("vera, targets: (", "adapter.targets: '(' is not a regular expression: missing ), unterminated subpattern"),
    ("lora, layers: last 3", "adapter.layers: found last 3, but the model has 2 layers (0 to 1)"),
    ("lora, layers: [2]", "adapter.layers: found [2], but the model has 2 layers (0 to 1)"),
    ("lora, layers: [-1]", "found a list, [-1] (must be text or a list of an integer from 0 to 9999)"),
    # Schedules that do not fit into the run
    ("adalora, tinit: 100, steps: 10", f"adapter.tinit: tinit 100 + tfinal 1 {NO_ROOM}"),
    ("adalora, tfinal: 10, steps: 10", f"adapter.tfinal: tinit 0 + tfinal 10 {NO_ROOM}"),
    ("adalora, tinit: 6, tfinal: 4, steps: 10", f"adapter.tinit: tinit 6 + tfinal 4 {NO_ROOM}"),
    (
        "adalora, delta_t: 7, steps: 10",
        "adapter.delta_t: 7 steps between budget updates, but the ranks fall over only 6 of the run's 10 steps,"
        " after tinit 1 and before tfinal 3 (use at most 6)",
    ),
    ("adalora, steps: 1", "leave none of the run's 1 steps to lower the ranks"),
    ("adalora, tinit: -1", "adapter.tinit: found -1 (must be an integer from 0 to"),
    ("adalora, tfinal: 0", "adapter.tfinal: found 0 (must be an integer from 1 to"),
    ("adalora, delta_t: 0", "adapter.delta_t: found 0 (must be an integer from 1 to"),
    (
        "adalora, initial_rank: 4, target_rank: 8",
        "adapter.target_rank: found 8, above adapter.initial_rank 4 (ranks only fall)",
    ),
    ("adalora, beta1: 1.0", "adapter.beta1: found 1.0 (must be a number above 0 and below 1)"),
    ("adalora, beta2: .nan", "adapter.beta2: found NaN (must be a number above 0 and below 1)"),
    ("adalora, orthogonal_weight: -1", "orthogonal_weight: found -1 (must be a number from 0 to 1000)"),
    (
        "relora, restart_every: 10, steps: 10",
        "adapter.restart_every: found 10, but the run has 10 steps: no restart would come before its end (train",
    ),
    ("relora, steps: 1", "adapter.restart_every: found null, which gives 1, but the run has 1 steps"),
    (
        "relora, restart_every: 3, restart_warmup: 3",
        "adapter.restart_warmup: found 3 steps, but a restart comes every 3 steps (at most 2)",
    ),
    ("relora, reset_fraction: .nan", "adapter.reset_fraction: found NaN (must be a number from 0 to 1)"),
    ("relora, reset_fraction: -0.1", "adapter.reset_fraction: found -0.1 (must be a number from 0 to 1)"),
    ("relora, export_rank: 0", "adapter.export_rank: found 0 (must be an integer from 1 to 65536 or null)"),
    # VeRA's limit is that of the layers
    (
        "vera, rank: 65",
        "adapter.rank: found 65, but the target layers have at most 64 inputs and 64 outputs, and an update's rank"
        " cannot exceed either (use at most 64)",
    ),
    (
        "vera, rank: 33, targets: [q_proj]",
        "adapter.rank: found 33, but the target layers have at most 32 inputs and 32 outputs",
    ),
    ("vera, d_initial: 0", f"adapter.d_initial: found 0 {START}"),
    ("vera, d_initial: .nan", f"adapter.d_initial: found NaN {START}"),
    ("vera, alpha: 8", "adapter.alpha: is a key of lora, qlora, dora, adalora, relora, not of adapter.method vera"),
    # What cannot stand on a quantized base, or only there
    *[(f"full, quantize: {form}", f"model.quantize: found {form}, {NOT_FULL}") for form in ("nf4", "fp4", "int8")],
    ("qlora, quantize: none", "found none, but qlora is LoRA on a quantized base (use nf4, or adapter.method: lora)"),
    ("full, parameters: encoder.*", "'encoder.*' matches no parameter (names look like model.norm.weight)"),
    ("full, rank: 4", "adapter.rank: is a key of lora, "),
]  # fmt: skip
"""The adapter's block, with `steps` and `quantize` for the blocks beside it, and a part of the line it must get."""

IN_A_PROCESS = "full, quantize: nf4"


@pytest.mark.parametrize(("text", "expected"), CASES, ids=[text for text, _ in CASES])
def test_it_is_refused(
    tmp_path: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    expected: str,
) -> None:
    """The command exits 2 with one line that names key, value and rule, and neither a run nor a log is left."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    adapter = yaml.safe_load(f"{{method: {text}}}")
    others: dict[str, Any] = {}
    for key, place in (("steps", "train__max_steps"), ("quantize", "model__quantize")):
        if key in adapter:
            others[place] = adapter.pop(key)
    recipe = write_recipe(tmp_path, base, adapter=adapter, **others)
    before = snapshot(tmp_path)
    results = [run_here(capsys, "train", str(recipe))]
    if text == IN_A_PROCESS:
        results.append(run_process(tmp_path, "train", str(recipe)))
    for result in results:
        (line,) = result.errors.splitlines()
        assert result.code == 2
        assert expected in line
        assert re.match(r"error: (.*recipe\.yaml:\d+:\d+: )?(adapter|model)\.\w+", line)
    after = {path: content for path, content in snapshot(tmp_path).items() if not path.startswith("cache")}
    assert after == before
