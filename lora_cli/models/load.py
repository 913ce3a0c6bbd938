"""A base model and its tokenizer from the bundled model, a local folder or the hub; safetensors only.

A hub id is first brought into a local folder (weights, config and tokenizer files only), so that one path leads to
the model and the same checks apply to both. A local folder never causes a connection. Python code in the folder runs
only where the recipe says so (`remote_code.py`); of the hub, only code of one commit.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging

from lora_cli.errors import InputError
from lora_cli.models import remote_code
from lora_cli.models.library_faults import reading
from lora_cli.models.load_quantized import load_quantized
from lora_cli.models.nf4 import Quantization
from lora_cli.models.safety import TINY, check_model_folder, check_tokenizer_folder
from lora_cli.network import reachable

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_SAMPLE_BYTES = 65536
_TOKENIZER_FILES = ["*.json", "tokenizer*", "*.jinja", "*.model"]
_HUB_FILES = ["*.safetensors", *_TOKENIZER_FILES]

# transformers draws progress bars for a few small files and warns about things we check ourselves.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def base_folder(base: str, revision: str | None = None, *, runs_code: bool = False) -> Path:
    """Return the local folder of a base: the bundled `tiny`, a folder, or a hub id's files in the hub cache.

    With `runs_code` the Python code in it, if there is any, may run from now on.

    Raises:
        InputError: the folder cannot be used, or the hub does not have the id or is out of reach.
    """
    if base == "tiny":
        return TINY
    folder = _local_folder(
        base, revision, [*_HUB_FILES, *(["*.py"] if runs_code else [])], runs_code=runs_code
    )
    check_model_folder(folder, runs_code=runs_code)
    remote_code.settle(folder, runs_code=runs_code)
    return folder


def tokenizer_folder(
    base: str, revision: str | None = None, *, runs_code: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Return the local folder of a base's tokenizer, and its config; no weights are needed or fetched.

    Raises:
        InputError: as `base_folder`.
    """
    if base == "tiny":
        return TINY, check_tokenizer_folder(TINY)
    folder = _local_folder(base, revision, _TOKENIZER_FILES, runs_code=runs_code)
    return folder, check_tokenizer_folder(folder, runs_code=runs_code)


def _local_folder(base: str, revision: str | None, files: list[str], *, runs_code: bool) -> Path:
    folder = Path(base).expanduser()
    if not folder.exists():
        if runs_code:
            remote_code.require_pinned("model.trust_remote_code", base, revision)
        try:
            with reachable():
                folder = Path(snapshot_download(base, revision=revision, allow_patterns=files))
        except HFValidationError as error:
            raise InputError(f"model.base: {base!r}: no such folder, and not a hub id") from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"model.base: {base!r}: no such folder, and the hub has no such model"
            ) from error
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"model.base: {base!r}: no such folder, and the hub did not answer ({reason})"
            ) from error
    return folder


def load_tokenizer(folder: Path) -> Any:
    """Return the folder's fast tokenizer.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    with reading(folder, "the tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: not a fast tokenizer (a tokenizer.json is needed)")
    return tokenizer


def base_fingerprint(folder: Path) -> str:
    """Return a sha256 that tells one base from another: its config, tensor headers, and samples of its weights.

    Reading whole weights of 100 GB would take minutes; 64 samples of 64 KiB a file find any retrained model. Of a base
    that runs its own code, this belongs to it.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.rglob("*.py")) if remote_code.may_run(folder) else ():
        digest.update(f"{path.relative_to(folder)} ".encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(64):
                file.seek(sample * max(size - _SAMPLE_BYTES, 0) // 63)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
    quantization: Quantization | None = None,
    headless: bool = False,
) -> PreTrainedModel:
    """Return the folder's decoder-only model in `dtype` on `device`, in evaluation mode.

    `attention` is transformers' name of an attention implementation; None: the one it prefers.
    With `quantization` its linear layers, but for the output head, are stored in that form and compute in `dtype`.
    `headless`: it may be a reward model, whose output head is not stored, and is zero then.

    Raises:
        InputError: it is not a causal language model that transformers knows, a weight is missing or misshapen, or
            it cannot be quantized as it is read.
    """
    if quantization is not None:
        return load_quantized(folder, quantization, dtype=dtype, device=device, attention=attention)
    runs_code = remote_code.may_run(folder)
    with reading(folder, "the model cannot be loaded"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=runs_code)
        config._attn_implementation = attention  # whatever it names itself, at the top or in a part
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=runs_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    model, report = loaded
    if headless and set(report.get("missing_keys", ())) & _head_names(model):
        report["missing_keys"] = set(report["missing_keys"]) - _head_names(model)
        for parameter in model.get_output_embeddings().parameters():
            torch.nn.init.zeros_(parameter)
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name if isinstance(name, str) else name[0]) for name in report.get(problem, ()))
        if names:
            # transformers would fill such weights with random numbers and go on.
            raise InputError(
                f"{folder}: {len(names)} weights are {problem.removesuffix('_keys')}, first {names[0]}"
            )
    model = model.to(device).eval()
    for parameter in model.parameters():
        # What was loaded on a CPU is a view of the mapped file: rewriting the file would change a running training.
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    return model


def _head_names(model: Any) -> set[str]:
    head = model.get_output_embeddings()
    return {
        name
        for name, parameter in model.named_parameters()
        if any(parameter is one for one in head.parameters())
    }


def fastest_attention(device: torch.device, max_length: int) -> str | None:
    """Return the attention that is fastest for rows of at most `max_length` tokens; all of them are exact.

    On a CPU the backward pass of torch's fused attention is slow for short rows: at 93 tokens a row (4 layers of 192,
    bfloat16) a whole training step takes 1.5 times as long as with plain matrix products.
    """
    return "eager" if device.type == "cpu" and max_length <= 256 else None
