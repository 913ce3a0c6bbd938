"""A model folder judged by its JSON files and tensor headers, before torch is imported or a weight is read.

What would run code is refused, not skipped: see `named_code.py`. So is what transformers would read in place of the
files that are judged here, or besides: an adapter beside the model, the shards of a distributed checkpoint. A config
that describes a far larger model than the weights hold is refused too: building it would fill the memory before the
mismatch is seen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_cli.errors import InputError
from lora_cli.models import named_code
from lora_cli.models.weight_files import Tensors, read_headers, read_json

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
"""The bundled base model."""

MAX_PARAMETERS = 10**13
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""What of a base belongs to its tokenizer, and is copied into what is exported."""
MORE_TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer that has several."""
_MOST = 10
"""Lines about one file, which may hold millions of faults."""
_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""What transformers 5.23 takes for a distributed checkpoint, and reads in place of model.safetensors."""
_NOT_CAUSAL = frozenset(
    {
        "albert", "bart", "bert", "bigbird", "big_bird", "blenderbot", "camembert", "canine", "clip",
        "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "flaubert",
        "fnet", "funnel", "ibert", "layoutlm", "led", "longformer", "luke", "m2m_100", "marian", "mbart",
        "megatron-bert", "mobilebert", "modernbert", "mpnet", "mt5", "nomic_bert", "nystromformer",
        "pegasus", "prophetnet", "roberta", "roberta-prelayernorm", "roformer", "splinter", "squeezebert",
        "switch_transformers", "t5", "umt5", "vit", "wav2vec2", "whisper", "xlm-roberta", "xlm-roberta-xl",
        "xmod", "yoso",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """What the files of a model say about it; `parameters` counts the stored values, tied tensors once."""

    model_type: str
    architectures: tuple[str, ...]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    tied: bool

    @property
    def summary(self) -> str:
        """One line for the user."""
        dtypes = "+".join(self.dtypes)
        millions, megabytes = self.parameters / 1e6, self.bytes / 1e6
        return f"{self.model_type}, {millions:,.1f} M parameters in {dtypes}, {megabytes:,.1f} MB"


def check_model_folder(path: Path, *, runs_code: bool = False) -> ModelHeader:
    """Return what the folder holds, if it is a decoder-only model in safetensors with a fast tokenizer.

    With `runs_code` config.json may name Python code in the folder.

    Raises:
        InputError: with a line per problem: files missing, damaged or that name code, or another model type.
    """
    config = _read_config(path)
    problems = [*_config_faults(path, config, runs_code=runs_code), *_misleading_files(path)]
    tensors: Tensors = {}
    try:
        tensors = read_headers(path)
        problems.extend(_size_faults(path, config, sum(count for _, count, _ in tensors.values())))
    except InputError as error:
        problems.extend(error.lines)
    problems.extend(_tokenizer_faults(path))
    if problems:
        raise InputError(problems)
    text, names = config.get("text_config"), config.get("architectures")
    tied = text.get("tie_word_embeddings", False) if isinstance(text, dict) else False
    return ModelHeader(
        model_type=str(config["model_type"]),
        architectures=tuple(map(str, names)) if isinstance(names, list) else (),
        parameters=sum(count for _, count, _ in tensors.values()),
        bytes=sum(size for _, _, size in tensors.values()),
        dtypes=tuple(sorted({dtype for dtype, _, _ in tensors.values()})),
        tied=bool(config.get("tie_word_embeddings", tied)),
    )


def check_tokenizer_folder(path: Path, *, runs_code: bool = False) -> dict[str, Any]:
    """Return the config of a decoder-only model whose weights need not be there, beside its fast tokenizer.

    Raises:
        InputError: as `check_model_folder`, for all but the weights.
    """
    config = _read_config(path)
    problems = [*_config_faults(path, config, runs_code=runs_code), *_tokenizer_faults(path)]
    if problems:
        raise InputError(problems)
    return config


def check_tokenizer(path: Path) -> None:
    """Refuse a fast tokenizer beside an adapter, or a config.json beside it, that names code.

    Raises:
        InputError: with a line per problem.
    """
    problems = list(_tokenizer_faults(path))
    if (path / "config.json").exists():
        problems += named_code.faults(path / "config.json", _read_config(path))
    if problems:
        raise InputError(problems)


def leads_out(file: Path, folder: Path) -> bool:
    """Say whether a file of a folder is a link to somewhere else.

    Those of the hub's cache, `models--x--y/snapshots/<commit>/`, lead to `models--x--y/blobs`, and from there maybe to
    `blobs` beside it, which models share.
    """
    home = folder.resolve()
    places = [home]
    if home.parent.name == "snapshots":
        model = home.parent.parent
        places += [model / "blobs", model.parent / "blobs"]
    path = Path(os.path.realpath(file))
    return not any(path.is_relative_to(place) for place in places)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path}: no such folder (give a model folder or a hub id)")
    if not path.is_dir():
        raise InputError(f"{path}: is not a folder (a model folder has config.json)")
    if not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            raise InputError(f"{path}: is an adapter, not a model (give the base model it was trained on)")
        raise InputError(
            f"{path}: there is no config.json (a model is a folder with config.json and *.safetensors)"
        )
    config: dict[str, Any] = read_json(path / "config.json")
    return config


def _config_faults(path: Path, config: dict[str, Any], *, runs_code: bool) -> Iterator[str]:
    place = path / "config.json"
    yield from islice(named_code.faults(place, config, runs_code=runs_code), _MOST)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        yield f"{place}: there is no model_type (is this a transformers model?)"
    elif config.get("is_encoder_decoder") is True:
        yield f"{place}: {kind[:80]} is an encoder-decoder model (a decoder-only language model is needed)"
    elif kind in _NOT_CAUSAL:
        yield f"{place}: {kind} is not a decoder-only language model (one is needed, such as llama or qwen3)"
    if (estimate := _parameter_estimate(config)) > MAX_PARAMETERS:
        yield f"{place}: describes {estimate:.1e} parameters, over {MAX_PARAMETERS:.0e} (download it again)"


def _size_faults(path: Path, config: dict[str, Any], stored: int) -> Iterator[str]:
    """Yield a fault where the estimate is beyond what quantization, tying or its own error can explain."""
    estimate = _parameter_estimate(config)
    if MAX_PARAMETERS >= estimate > 100 * stored + 100_000_000:
        told = f"describes {estimate:.1e} parameters, but the weight files hold {stored:.1e}"
        yield f"{path / 'config.json'}: {told} (download it again)"


def _misleading_files(path: Path) -> Iterator[str]:
    """Yield a fault per file that transformers would read in place of the weights, or put into the model."""
    if (path / "adapter_config.json").exists():
        yield (
            f"{path / 'adapter_config.json'}: lies beside a model, into which transformers would put it where PEFT is"
            " installed (move the adapter to a folder of its own)"
        )
    for name in sorted(os.listdir(path)):
        if _SHARD.fullmatch(name):
            yield f"{path / name}: is a part of a distributed checkpoint (save the model with transformers)"
            return


def _parameter_estimate(config: dict[str, Any]) -> float:
    """Return a rough count: embeddings, and per layer 4 projections and 3 to the intermediate size, for each expert.

    Where positions are learned, a square mask of them is counted too, which such models build.
    """
    total = 0.0
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):

        def size(*names: str, part: dict[str, Any] = part) -> float:
            found = [part[name] for name in names if isinstance(part.get(name), (int, float))]
            return float(min(found[0], 10**30)) if found else 0.0

        hidden = size("hidden_size", "n_embd", "d_model", "dim")
        layers = size("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        inner = size("intermediate_size", "n_inner", "d_ff") or 4 * hidden
        heads, positions = size("num_attention_heads", "n_head") * size("head_dim"), size("n_positions")
        experts = size("num_experts", "num_local_experts", "n_routed_experts") * size("moe_intermediate_size")
        of_layer = 4 * hidden + 3 * inner + 2 * heads + 3 * experts + 1
        total += size("vocab_size") * hidden + layers * of_layer * max(hidden, 1)
        total += positions * (hidden + positions)
    return total


def _tokenizer_faults(path: Path) -> Iterator[str]:
    if not (path / "tokenizer.json").exists():
        yield f"{path}: there is no tokenizer.json (a fast tokenizer is needed; save it with transformers)"
        return
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if name != "tokenizer.json" and not (path / name).exists():
            continue
        try:
            content = read_json(path / name)
        except InputError as error:
            yield from error.lines
            continue
        if name != "tokenizer.json":  # a vocabulary may hold any word, these too
            yield from islice(named_code.faults(path / name, content), _MOST)
    copied = [path / name for name in (*TOKENIZER_FILES, "generation_config.json")]
    for file in (*copied, *path.glob(f"{MORE_TEMPLATES}/*")):
        if file.is_symlink() and leads_out(file, path):
            # Whatever it leads to would be published with the next adapter.
            yield f"{file}: is a link out of the folder, and would be copied into what is exported (copy it there)"
