"""TRL's side of preference optimization: DPOTrainer with a PEFT configuration, on pairs that are tokenized already."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch

from side_by_side import peft_methods
from side_by_side.pairs import Pair, read_steps
from side_by_side.records import IGNORED, Job, Recorder, UnequalError, measure


def run(job: Job, recorder: Recorder) -> None:
    """Make the steps of the job."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    trainer = _trainer(job, recorder, read_steps(job.work), tokenizer)
    if job.start is not None:
        peft_methods.fill(trainer.model, job.start)
    clip = trainer.accelerator.clip_grad_norm_

    def clip_and_record(*arguments: Any, **named: Any) -> Any:
        recorder.norm = clip(*arguments, **named)
        return recorder.norm

    trainer.accelerator.clip_grad_norm_ = clip_and_record
    trainer.train()


def settings(job: Job, size: int, folder: str) -> dict[str, Any]:
    """Return the arguments of DPOConfig: what equal work needs, and what the side's options ask for.

    Raises:
        UnequalError: a step cannot be made of whole micro-batches.
    """
    rows = min(job.options.get("rows", 8), size)
    if size % rows:
        raise UnequalError(f"a step of {size} pairs cannot be made of {rows} at a time")
    chosen: dict[str, Any] = {} if job.dtype == "bfloat16" else {"bf16": False}
    if not job.options.get("checkpointing", True):
        chosen["gradient_checkpointing"] = False
    if job.options.get("precompute"):
        chosen["precompute_ref_log_probs"] = True
    return chosen | {
        "output_dir": folder, "max_steps": job.steps, "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": size // rows, "learning_rate": job.learning_rate, "max_length": None,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": job.device == "cpu",
    }  # fmt: skip


def _dataset(job: Job, steps: list[list[Pair]]) -> Any:
    """Return the pairs in order; `sorted` puts those of like length beside each other within a step."""
    from datasets import Dataset

    if job.options.get("sorted"):
        steps = [sorted(step, key=lambda pair: -len(pair[0]) - max(map(len, pair[1:]))) for step in steps]
    columns = zip(*(pair for step in steps for pair in step), strict=True)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict(dict(zip(names, map(list, columns), strict=True)))


def _trainer(job: Job, recorder: Recorder, steps: list[list[Pair]], tokenizer: Any) -> Any:
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    size = len(steps[0])
    arguments = settings(job, size, tempfile.mkdtemp(prefix="side-by-side-"))
    share = 1 / arguments["gradient_accumulation_steps"]

    class Watched(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any, **named: Any) -> Any:
            return dataset  # tokenized already

        def _precompute_ref_logps(self, *rest: Any, **named: Any) -> Any:
            began = time.monotonic()
            dataset = super()._precompute_ref_logps(*rest, **named)
            recorder.numbers["reference_seconds"] = time.monotonic() - began
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask, ids = inputs["attention_mask"], inputs["input_ids"]
            recorder.see(ids, ids.masked_fill(inputs["completion_mask"] == 0, IGNORED), mask=mask)
            loss = super().compute_loss(model, inputs, *rest, **named)
            recorder.add_loss(loss.detach() * share)
            return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, *rest: Any, **named: Any) -> None:
            recorder.begin()

        def on_step_end(self, *rest: Any, **named: Any) -> None:
            recorder.end()

    tuned = bool(job.options.get("bf16_model")) and job.dtype == "bfloat16"
    return Watched(
        model=job.model,
        args=DPOConfig(**arguments, model_init_kwargs={"dtype": "bfloat16"} if tuned else {}),
        train_dataset=_dataset(job, steps),
        processing_class=tokenizer,
        peft_config=peft_methods.config(job, job.options["adapter"]),
        callbacks=[Steps()],
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    measure(run)
