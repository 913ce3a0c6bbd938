"""TRL's side: SFTTrainer with a PEFT configuration, on rows that are tokenized already."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from side_by_side import peft_methods
from side_by_side.records import Document, Job, Recorder, UnequalError, measure, read_work


def run(job: Job, recorder: Recorder) -> None:
    """Make the case's steps."""
    from transformers import AutoTokenizer

    steps = read_work(job.work)
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    trainer = _trainer(job, recorder, steps, tokenizer)
    if job.start is not None:
        peft_methods.fill(trainer.model, job.start)
    clip = trainer.accelerator.clip_grad_norm_

    def clip_and_record(*arguments: Any, **named: Any) -> Any:
        recorder.norm = clip(*arguments, **named)
        return recorder.norm

    trainer.accelerator.clip_grad_norm_ = clip_and_record
    trainer.train()


def settings(job: Job, size: int, folder: str) -> dict[str, Any]:
    """Return the arguments of SFTConfig: what equal work needs, and what the side's options ask for.

    Raises:
        UnequalError: a step cannot be made of whole micro-batches.
    """
    rows = min(job.options.get("rows", 8), size)
    if size % rows:
        raise UnequalError(f"a step of {size} documents cannot be made of {rows} at a time")
    equal = {
        "output_dir": folder, "max_steps": job.steps, "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": size // rows, "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "dataset_kwargs": {"skip_prepare_dataset": True},
        "use_cpu": job.device == "cpu",
    }  # fmt: skip
    chosen: dict[str, Any] = {} if job.dtype == "bfloat16" else {"bf16": False}
    if not job.options.get("checkpointing", True):
        chosen["gradient_checkpointing"] = False
    if job.options.get("packed"):
        chosen |= {"padding_free": True, "max_length": None}
    if job.options.get("liger"):
        chosen["use_liger_kernel"] = True
    return equal | chosen


def dataset(job: Job, steps: list[list[Document]]) -> Any:
    """Return the documents in order; `sorted` puts those of like length beside each other within a step."""
    from datasets import Dataset

    if job.options.get("sorted"):
        steps = [sorted(step, key=lambda document: -len(document[0])) for step in steps]
    documents = [document for step in steps for document in step]
    return Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids, _ in documents],
            "labels": [labels.tolist() for _, labels in documents],
        }
    )


def _trainer(job: Job, recorder: Recorder, steps: list[list[Document]], tokenizer: Any) -> Any:
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watched(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            recorder.see(
                inputs["input_ids"], inputs["labels"],
                mask=inputs.get("attention_mask"), positions=inputs.get("position_ids"),
            )  # fmt: skip
            loss = super().compute_loss(model, inputs, *rest, **named)
            recorder.add_loss(loss.detach())
            return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, *rest: Any, **named: Any) -> None:
            recorder.begin()

        def on_step_end(self, *rest: Any, **named: Any) -> None:
            recorder.end()

    tuned = bool(job.options.get("bf16_model"))
    model: dict[str, Any] = {"dtype": "bfloat16"} if tuned and job.dtype == "bfloat16" else {}
    if (quantized := peft_methods.quantization(job, bf16_compute=tuned)) is not None:
        model["quantization_config"] = quantized
    arguments = settings(job, len(steps[0]), tempfile.mkdtemp(prefix="side-by-side-"))
    return Watched(
        model=job.model, args=SFTConfig(**arguments, model_init_kwargs=model), train_dataset=dataset(job, steps),
        processing_class=tokenizer, peft_config=peft_methods.config(job, job.options["adapter"]), callbacks=[Steps()],
    )  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    measure(run)
