"""Which linear layers of a model a recipe's `targets` names."""

from __future__ import annotations

import difflib
import re
import signal
import threading
from types import FrameType

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import InputError
from lora_cli.models.nf4 import QuantizedLinear
from lora_cli.recipe.section import regex_fault

SECONDS = 1.0
"""Of processor time for comparing one pattern with one path, which takes microseconds."""
BASE_LINEARS = (nn.Linear, Conv1D, QuantizedLinear)
BaseLinear = nn.Linear | Conv1D | QuantizedLinear
"""What an adapter layer stands around; its weight is `AdapterLinear.base_weight()`, whatever the kind."""

# Path components that name a block of each kind, in the transformers model code of the decoder families.
GROUPS = {
    "attention": {"self_attn", "attn", "attention", "self_attention", "linear_attn"},
    "mlp": {"mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1", "fc2"},
}

ALONE = ("all-linear", *GROUPS)
"""Names of targets that stand alone."""


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer of the model by its path, in the model's order."""
    return {path: module for path, module in model.named_modules() if _is_linear(module)}


def _is_linear(module: nn.Module) -> bool:
    """Say whether a module computes what a linear layer does: subclasses route tokens, or work in groups."""
    if not isinstance(module, BASE_LINEARS):
        return False
    plain = any(type(module).forward is kind.forward for kind in BASE_LINEARS)
    return plain or type(module).__name__ == "FalconLinear"  # whose own forward differs in rounding alone


def expert_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hold the weights of several experts, (experts, out, in), by their whole names."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "experts" in name.split(".")
    }


def is_lookup(module: nn.Module) -> bool:
    """Say whether a module is an embedding whose output is a row of its weight, times `embedding_scale`."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return type(module).forward is nn.Embedding.forward or embedding_scale(module) is not None


def embedding_scale(embedding: nn.Embedding) -> float | None:
    """Return what the module multiplies a row with (Gemma: the root of its width); None where it says nothing.

    Models that scale outside the module, after the lookup, need no care: what is added to a row is scaled with it.
    """
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return None
    # As the module itself rounds it: Gemma's scale is cast to the dtype of the weight.
    return float(torch.as_tensor(scale).to(embedding.weight.dtype))


def match_targets(
    model: PreTrainedModel,
    targets: str | list[str],
    *,
    where: str = "adapter.targets",
    embeddings: bool = False,
) -> list[str]:
    """Return the paths of the linear layers that `targets` names, in the model's order; `where` heads a message.

    `all-linear` is every linear layer but the output head; `attention` and `mlp` are those inside such blocks; a list
    holds module names matched at the end of the path; any other string is a regular expression for the whole path.
    With `embeddings`, a list or an expression may name embeddings too.

    Raises:
        InputError: a target matches no linear layer, or the regular expression is not valid.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linears = linear_layers(model)
    inner = [path for path, module in linears.items() if module is not head]
    named = {
        path: module
        for path, module in model.named_modules()
        if path in linears or (embeddings and is_lookup(module))
    }
    if targets == "all-linear":
        return _non_empty(inner, "all-linear", model, where)
    if isinstance(targets, list):
        chosen: set[str] = set()
        for target in targets:
            found = [path for path in named if path == target or path.endswith(f".{target}")]
            if not found:
                _refuse_embedding(model, target, where, embeddings=embeddings)
            chosen.update(_non_empty(found, target, model, where, listed=True))
        return [path for path in named if path in chosen]
    if targets in GROUPS:
        found = [path for path in inner if GROUPS[targets] & set(path.split("."))]
        return _non_empty(found, targets, model, where)
    if fault := regex_fault(targets):
        raise InputError(f"{where}: {fault}")
    return _non_empty([path for path in named if fully_matches(targets, path)], targets, model, where)


def fully_matches(pattern: str, path: str) -> re.Match[str] | None:
    """Match a whole module path; a pattern may come with somebody else's adapter, and one that backtracks has no end.

    The timer is a signal, which only a main thread can receive.

    Raises:
        InputError: it takes more than SECONDS of processor time.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise InputError(
            f"the pattern {pattern[:80]!r} does not come to an end within {SECONDS:g} s on {path} (write a simpler one)"
        )

    if threading.current_thread() is not threading.main_thread():
        return re.fullmatch(pattern, path)
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        return re.fullmatch(pattern, path)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def short_names(model: PreTrainedModel, paths: list[str], *, embeddings: bool = False) -> list[str]:
    """Return the shortest target list that names exactly `paths`: module names where they do, else the paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if match_targets(model, names, embeddings=embeddings) == paths else sorted(paths)


def _refuse_embedding(model: nn.Module, target: str, where: str, *, embeddings: bool) -> None:
    """Say of a target that is an embedding why it gets no adapter.

    Raises:
        InputError: it is one.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and f".{path}".endswith(f".{target}"):
            why = "computes more than a lookup" if embeddings else "this method does not adapt"
            remedy = "leave it out" if embeddings else "leave it out, or use method: lora"
            found = f"an embedding and {why}" if embeddings else f"an embedding, which {why}"
            raise InputError(f"{where}: {target!r} is {found} ({remedy})")


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` of the model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _non_empty(
    paths: list[str], target: str, model: nn.Module, where: str, *, listed: bool = False
) -> list[str]:
    if paths:
        return paths
    names = sorted({path.rpartition(".")[2] for path in linear_layers(model)})
    words = re.split(r"[\s,|]+", target.strip("()"))
    if listed and target in ALONE:
        hint = f"write targets: {target}, alone and not in a list, which is of module names"
    elif not listed and set(words) <= set(names):
        hint = f"as a text it is a pattern for the whole path; write [{', '.join(words)}] for module names"
    elif experts := sorted({name.rpartition(".")[2] for name in expert_tensors(model)}):
        hint = (
            f"its linear layers are named {', '.join(names)}; its experts are 3-D tensors, {', '.join(experts)}, which"
            " get no adapter: leave them out, or train them themselves with adapter.method full and parameters"
            " '.*experts.*'"
        )
    elif near := difflib.get_close_matches(target, names if listed else {*ALONE, *names} - {target}, n=1):
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"its linear layers are named {', '.join(names) or 'nothing'}"
    raise InputError(f"{where}: {target!r} matches no linear layer of the model ({hint})")
