"""What is compared: cases, sides, and the goals that the project has set itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

RANK, ALPHA = 16, 32.0
PLANNED_STEPS = 1000
"""Length of the run that a case is the beginning of: schedules and what pays off only in time are settled by it."""


@dataclass(frozen=True)
class Case:
    """One row of the comparison; times are ours of a step against theirs."""

    title: str
    data: str
    """`dense`, or `answers` (GSM8K)."""
    adapter: Mapping[str, Any]
    """The recipe's block."""
    default_goal: float | None
    """TRL as it comes takes at least so many times our time."""
    tuned_goal: float | None
    """The same of the fastest peer that was tuned."""
    own_goal: float | None = None
    """We take at most so many times what our LoRA takes on the same rows."""
    memory_goal: float | None = None
    """Our peak memory is at most this part of that of the leanest tuned peer."""
    roofline_goal: float | None = None
    """At least this part of the measured rate of matrix products is useful work of ours."""
    peer_goals: Mapping[str, float] = field(default_factory=dict)
    """The same as `tuned_goal`, of peers by name."""
    rate_goal: float | None = None
    """Tokens a second."""
    peers_of: str | None = None
    """The case whose peers stand for this one's."""
    note: str = ""

    @property
    def method(self) -> str:
        """The method's name in a recipe."""
        return str(self.adapter["method"])


LORA = {"method": "lora", "rank": RANK, "alpha": ALPHA}
CASES: dict[str, Case] = {
    "dense": Case("LoRA, dense", "dense", LORA, 3.5, 2.0, roofline_goal=0.25),
    "gsm8k": Case("LoRA, GSM8K", "answers", LORA, 6.0, 3.0, memory_goal=0.6),
    "dora": Case("DoRA, GSM8K", "answers", LORA | {"method": "dora"}, 8.0, 2.5, own_goal=1.10),
    "qlora": Case(
        "QLoRA NF4, GSM8K", "answers", LORA | {"method": "qlora"}, 6.0, 2.5, own_goal=1 / 0.88,
        note="peers: bitsandbytes, which on some CPUs repacks weights in evaluation mode and then returns no"
        " gradient; no side evaluates, and gradient norms are compared",
    ),
    "adalora": Case(
        "AdaLoRA, GSM8K", "answers",
        {"method": "adalora", "initial_rank": 12, "target_rank": 8, "alpha": ALPHA, "tinit": 0, "tfinal": 300,
         "delta_t": 1},
        5.0, 2.0, own_goal=1.15,
        note="budget updated at every step; TRL leaves out the penalty and the budget, PEFT's loop has both",
    ),
    "vera": Case("VeRA, GSM8K", "answers", {"method": "vera", "rank": 256}, 5.0, 2.0, own_goal=1.15),
    "relora": Case(
        "ReLoRA, GSM8K", "answers", LORA | {"method": "relora"}, 5.0, 2.0, own_goal=1.15, peers_of="gsm8k",
        note="no peer has it: theirs is LoRA on the same rows; ours restarts at its last warm-up step, and the timed"
        " steps carry what was merged",
    ),
    "full": Case("full fine-tuning, GSM8K", "answers", {"method": "full"}, 3.0, 1.7),
}  # fmt: skip
CUDA_GOALS: dict[str, dict[str, Any]] = {
    "dense": {
        "tuned_goal": None, "peer_goals": {"trl-tuned": 1.35, "unsloth-tuned": 1.2}, "memory_goal": 0.6,
        "rate_goal": 15_000.0, "roofline_goal": None,
    },
    "dora": {"own_goal": 1.08},
    "qlora": {"own_goal": 1 / 0.92},
}  # fmt: skip
"""On an H200 with the shape of an 8B model, 4 x 4,096; cases without an entry have no goal there."""


def case_on(device: str, name: str) -> Case:
    """Return a case with the goals of the device."""
    if device == "cpu":
        return CASES[name]
    goals = {"default_goal": None, "tuned_goal": None, "own_goal": None, "memory_goal": None}
    return replace(CASES[name], **goals | CUDA_GOALS.get(name, {}))


@dataclass(frozen=True)
class Side:
    """A trainer, and how it is set up."""

    module: str
    how: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = False
    """It counts among the tuned peers."""
    methods: tuple[str, ...] = ("lora", "dora", "qlora", "adalora", "vera", "full")
    needs: tuple[str, ...] = ()
    """Packages, with pins where they clash with ours; then it has an environment of its own."""
    own_environment: bool = False
    packs: bool = False
    """Rows share a sequence, which documents of equal length gain nothing from."""
    rounds_loss: bool = False
    """In bfloat16 its loss is a bfloat16 number, sum and mean, and can only be compared as such."""
    cuda_only: bool = False


_TUNED = {"bf16_model": True, "checkpointing": False, "sorted": True}
OURS = Side("ours", "the product's own stages with a recipe for the case, all else at its defaults")
PEERS: dict[str, Side] = {
    "trl": Side(
        "trl_side",
        "SFTTrainer and PEFT as they come: float32 weights under bfloat16 autocast, gradient checkpointing, 8 rows at a"
        " time, padded",
    ),
    "trl-tuned": Side(
        "trl_side",
        "SFTTrainer with a bfloat16 model, no gradient checkpointing, 8 rows of like length at a time",
        _TUNED,
        tuned=True,
    ),
    "trl-packed": Side(
        "trl_side",
        "SFTTrainer with a bfloat16 model, no gradient checkpointing, padding_free=True with 4 rows in a sequence",
        _TUNED | {"packed": True, "rows": 4},
        tuned=True,
        packs=True,
    ),
    "peft-tuned": Side(
        "peft_side",
        "PEFT in a plain loop: bfloat16 model and adapters, no gradient checkpointing, 8 rows of like length at a time,"
        " transformers' own loss",
        tuned=True,
    ),
    "peft-eager": Side(
        "peft_side", "peft-tuned with attn_implementation=eager", {"attention": "eager"}, tuned=True
    ),
    "peft-compiled": Side(
        "peft_side",
        "peft-tuned with every decoder layer compiled by torch.compile(dynamic=True)",
        {"compile": True},
        tuned=True,
    ),
    "litgpt": Side(
        "litgpt_side",
        "litgpt 0.5.13: bf16-true, its chunked loss, 8 rows of like length at a time; micro-batches weighted by their"
        " labelled tokens, where its own loop takes the mean of means; its loss is rounded to bfloat16, and is compared"
        " to 1.2e-2 there",
        tuned=True,
        rounds_loss=True,
        methods=("lora",),
        needs=("litgpt==0.5.13", "torch==2.13.0", "numpy", "safetensors"),
        own_environment=True,
    ),
    "trl-liger": Side(
        "trl_side",
        "trl-tuned with Liger's layer kernels",
        _TUNED | {"liger": True},
        tuned=True,
        needs=("liger-kernel",),
        cuda_only=True,
    ),
    "unsloth": Side(
        "unsloth_side",
        "FastLanguageModel and SFTTrainer as they come",
        tuned=False,
        methods=("lora", "qlora"),
        needs=("unsloth==2026.10.9",),
        own_environment=True,
        cuda_only=True,
    ),
    "unsloth-tuned": Side(
        "unsloth_side",
        "unsloth with use_gradient_checkpointing=False",
        {"checkpointing": False},
        tuned=True,
        methods=("lora", "qlora"),
        needs=("unsloth==2026.10.9",),
        own_environment=True,
        cuda_only=True,
    ),
}
