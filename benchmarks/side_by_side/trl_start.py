"""The script that a user of TRL writes for the rows of `starting.py`: model, rows and output folder as arguments."""

from __future__ import annotations

import sys
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class FirstStep(TrainerCallback):
    """Says when the first step is done."""

    def on_step_end(self, *rest: Any, **named: Any) -> None:
        """Print the line that is waited for."""
        print("\nfirst step done", flush=True)


def main(model: str, rows: str, output: str) -> None:
    """Train on a file of prompts and completions."""
    settings = SFTConfig(
        output_dir=output, per_device_train_batch_size=4, max_steps=1000, report_to="none", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    SFTTrainer(
        model=model,
        args=settings,
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[FirstStep()],
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
