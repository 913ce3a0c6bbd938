"""What the user may have meant: the nearest valid key, our key for another tool's name, the nearest value.

No value is shown unredacted: a recipe that holds a secret is refused, and the error must not print it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from lora_cli.recipe.keys import all_keys
from lora_cli.redaction import redacted, without_secrets

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "model.base": (
        "base_model", "model_name_or_path", "pretrained_model_name_or_path", "model_name", "model_id",
        "model_path", "checkpoint_dir", "base_model_name_or_path",
    ),
    "model.dtype": ("torch_dtype", "bf16", "fp16", "precision", "mixed_precision"),
    "model.quantize": (
        "load_in_4bit", "load_in_8bit", "quantization", "quantization_bit", "quant_type", "bnb_4bit_quant_type",
    ),
    "model.double_quant": ("bnb_4bit_use_double_quant", "use_double_quant", "double_quantization"),
    "data.train": (
        "dataset", "datasets", "train_file", "train_data", "data_path", "dataset_path", "dataset_name",
        "data_files", "train_dataset", "training_data",
    ),
    "data.eval": (
        "val_file", "eval_file", "validation_file", "validation", "eval_dataset", "test_datasets", "valid",
    ),
    "data.max_length": (
        "cutoff_len", "max_seq_length", "max_seq_len", "sequence_len", "block_size", "model_max_length",
    ),
    "data.template": ("chat_template",),
    "adapter.method": ("peft_type", "adapter_type", "finetuning_type", "peft_method", "use_dora", "peft_use_dora"),
    "adapter.rank": ("r", "lora_r", "lora_rank"),
    "adapter.initial_rank": ("init_r",),
    "adapter.target_rank": ("target_r",),
    "adapter.delta_t": ("deltat",),
    "adapter.orthogonal_weight": ("orth_reg_weight",),
    "adapter.eva_rho": ("rho",),
    "adapter.alpha": ("lora_alpha",),
    "adapter.dropout": ("lora_dropout",),
    "adapter.train_also": ("modules_to_save", "lora_modules_to_save", "additional_target", "unfrozen_parameters"),
    "adapter.train_tokens": ("trainable_token_indices", "trainable_tokens"),
    "adapter.add_tokens": ("tokens", "new_tokens", "new_special_tokens", "additional_special_tokens", "added_tokens"),
    "adapter.init": (
        "init_lora_weights", "peft_init_lora_weights", "init_method", "eva_config", "loftq_config",
    ),
    "adapter.init_from": ("lora_model_dir", "adapter_name_or_path", "resume_adapter_file"),
    "adapter.layers": ("layers_to_transform", "lora_layers_to_transform", "num_layers", "lora_layers"),
    "adapter.scaling": ("use_rslora", "rslora", "peft_use_rslora"),
    "adapter.plus_ratio": ("loraplus_lr_ratio", "loraplus_ratio"),
    "adapter.targets": ("target_modules", "lora_target_modules", "lora_target", "lora_attn_modules"),
    "objective.name": ("stage", "loss_type", "trainer_type", "task"),
    "objective.train_on": ("train_on_inputs", "train_on_input", "train_on_prompt", "completion_only_loss"),
    "objective.rewards": ("reward_funcs", "reward_functions", "reward_fn"),
    "objective.samples": ("num_generations", "rloo_k"),
    "objective.updates_per_rollout": ("num_iterations", "num_ppo_epochs", "ppo_epochs"),
    "objective.clip_low": ("cliprange", "clip_range"),
    "objective.clip_high": ("epsilon_high",),
    "objective.beta": ("kl_coef", "init_kl_coef"),
    "objective.scale": ("scale_rewards",),
    "objective.gae_lambda": ("lam",),
    "objective.value_weight": ("vf_coef",),
    "objective.value_clip": ("cliprange_value",),
    "objective.whiten": ("whiten_advantages",),
    "objective.sampling.max_new_tokens": ("max_completion_length", "response_length"),
    "train.epochs": ("num_train_epochs", "num_epochs", "n_epochs"),
    "train.max_steps": ("total_steps", "max_steps_per_epoch", "iters", "num_steps"),
    "train.batch_size": (
        "per_device_train_batch_size", "train_batch_size", "gradient_accumulation_steps", "global_batch_size",
        "micro_batch_size", "accumulation",
    ),
    "train.learning_rate": ("lr", "learning_rates", "lr_max"),
    "train.schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule"),
    "train.warmup": ("warmup_steps", "warmup_ratio", "num_warmup_steps", "lr_warmup_steps"),
    "train.floor": ("min_lr", "min_lr_ratio", "cosine_min_lr_ratio"),
    "train.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2"),
    "train.eps": ("adam_epsilon", "adam_eps", "epsilon"),
    "train.max_grad_norm": ("gradient_clipping", "clip_grad_norm", "grad_clip", "max_norm"),
    "train.log_every": ("logging_steps", "log_interval", "steps_per_report"),
    "train.eval_every": ("eval_steps", "eval_interval", "steps_per_eval", "evals_per_epoch"),
    "train.save_every": ("save_steps", "save_interval", "saves_per_epoch"),
    "train.keep_checkpoints": ("save_total_limit",),
    "train.early_stopping": ("early_stopping_patience", "patience"),
    "train.final_weights": ("load_best_model_at_end",),
    "evaluate.batch_tokens": ("per_device_eval_batch_size", "eval_batch_size"),
    "run.output": ("output_dir", "out_dir", "save_dir", "adapter_path", "logging_dir"),
    "run.seed": ("random_seed", "data_seed"),
    "evaluate": ("eval", "evaluation"),
    "model": ("base_model_config",),
    "adapter": ("peft", "lora", "peft_config"),
    "objective": ("loss", "rl"),
    "train": ("training", "trainer", "optimizer"),
}  # fmt: skip
"""Our key -> what Axolotl, LLaMA-Factory, TRL, PEFT, torchtune, LitGPT and MLX call it."""


def nearest_key(path: str, taken: Iterable[str] = ()) -> str:
    """Return ` (did you mean ...?)` for an unknown key, or nothing; `taken` are keys already written."""
    guess = _guess(path, set(taken))
    return f" (did you mean {guess}?)" if guess else ""


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the choice that looks most like `word`, None where none does."""
    found = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=cutoff)
    return found[0] if found else None


def shown(value: Any, limit: int = 60) -> str:
    """Return a value as an error message shows it: short, on one line, redacted."""
    if isinstance(value, str):
        text = f"the text {redacted(value)[: limit + 1]!r}" if value else "an empty text"
    elif isinstance(value, (dict, list)):
        kind = "a block" if isinstance(value, dict) else "a list"
        text = f"{kind}, {redacted(json.dumps(without_secrets(value), ensure_ascii=False)[:1000])}"
    else:
        text = "nothing (null)" if value is None else json.dumps(value)
    return text if len(text) <= limit + 12 else text[:limit] + "..."


def _guess(path: str, taken: set[str]) -> str | None:
    block, _, leaf = path.rpartition(".")
    paths = list(dict.fromkeys(key.path for key in all_keys()))
    words = leaf.lower().replace("-", "_")
    exact = [known for known in paths if known.rpartition(".")[2] == words and known != path]
    if len(exact) > 1:  # the one in the same block, else the deepest
        exact = [known for known in exact if known.startswith(block + ".")] or exact
    if exact and words not in {known for known in paths if "." not in known and block == ""}:
        return exact[-1]
    for ours, others in OTHER_NAMES.items():
        if words in others:
            return ours
    same_block = {known.rpartition(".")[2]: known for known in paths if known.rpartition(".")[0] == block}
    if (found := nearest(words, [name for name in same_block if same_block[name] not in taken])) is not None:
        return same_block[found]
    if block and (top := block.partition(".")[0]) not in {known for known in paths if "." not in known}:
        right = _guess(top, taken)
        moved = f"{right}.{leaf}" if right else ""
        if moved in paths:
            return moved
    by_leaf = {known.rpartition(".")[2]: known for known in paths}
    return by_leaf[found] if (found := nearest(words, by_leaf, cutoff=0.75)) is not None else None
