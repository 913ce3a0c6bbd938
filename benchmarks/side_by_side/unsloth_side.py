"""Unsloth's side, on CUDA: its FastLanguageModel under TRL's SFTTrainer of the version it asks for."""

from __future__ import annotations

import tempfile
from typing import Any

from side_by_side.records import Document, Job, Recorder, measure, read_work


def run(job: Job, recorder: Recorder) -> None:
    """Make the case's steps."""
    # First, as it changes what is imported after it.
    from unsloth import FastLanguageModel  # isort: skip

    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from side_by_side import peft_methods, trl_side

    steps: list[list[Document]] = read_work(job.work)
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=max(len(ids) for step in steps for ids, _ in step),
        dtype=getattr(torch, job.dtype), load_in_4bit=job.method == "qlora",
    )  # fmt: skip
    checkpointing: Any = "unsloth" if job.options.get("checkpointing", True) else False
    model = FastLanguageModel.get_peft_model(
        model, r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    assert job.start is not None
    peft_methods.fill(model, job.start)

    class Steps(TrainerCallback):
        def on_train_begin(self, *rest: Any, **named: Any) -> None:
            recorder.begin()

        def on_step_end(self, *rest: Any, **named: Any) -> None:
            recorder.end()

    class Watched(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            recorder.see(inputs["input_ids"], inputs["labels"], mask=inputs.get("attention_mask"))
            loss = super().compute_loss(model, inputs, *rest, **named)
            recorder.add_loss((loss[0] if isinstance(loss, tuple) else loss).detach())
            return loss

    arguments = trl_side.settings(job, len(steps[0]), tempfile.mkdtemp(prefix="side-by-side-"))
    if checkpointing:
        arguments.pop("gradient_checkpointing", None)
    trainer = Watched(
        model=model, args=SFTConfig(**arguments), train_dataset=trl_side.dataset(job, steps),
        processing_class=tokenizer, callbacks=[Steps()],
    )  # fmt: skip
    clip = trainer.accelerator.clip_grad_norm_

    def clip_and_record(*rest: Any, **named: Any) -> Any:
        recorder.norm = clip(*rest, **named)
        return recorder.norm

    trainer.accelerator.clip_grad_norm_ = clip_and_record
    trainer.train()


if __name__ == "__main__":
    measure(run)
