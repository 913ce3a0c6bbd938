"""A reward model's head: one linear function, without a bias, of the last hidden state at the end of an answer.

It is what transformers calls `score` in its sequence classifiers (`AutoModelForSequenceClassification`, one label), and
so is where it looks: at the rightmost token that is not the padding token, by its id. Where the terminator of answers
serves as padding too, that is the token before it. What a row has behind its answer is not read.

Shapes: B rows, T tokens, A answers, H hidden size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lora_cli.errors import InputError
from lora_cli.types import IGNORED, Batch

NAME = "score.weight"
"""Of the head in a sequence classifier; in a PEFT adapter with the prefix of the model before it."""
_NAMES = (NAME, f"base_model.model.{NAME}")


@dataclass(frozen=True, slots=True)
class ScoreHead:
    """A head as it is exported: its weight (1, H) float32, and the token that is taken for padding."""

    weight: Tensor
    pad_id: int


def zero_head(model: PreTrainedModel, *, bias: bool) -> nn.Linear:
    """Return a float32 head on the model's last hidden states whose output is 0: (..., H) -> (..., 1)."""
    size = model.config.get_text_config().hidden_size
    head = nn.Linear(size, 1, bias=bias, device=model.device, dtype=torch.float32)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def last_places(batch: Batch, pad_id: int) -> Tensor:
    """Return where each answer of a batch is scored, (A,) in the batch flattened: the last token that is no padding.

    An answer ends with the last trained token of its row or document; one without any has no answer.
    """
    rows, length = batch.input_ids.shape
    offsets = torch.arange(rows + 1, device=batch.input_ids.device) * length
    if batch.documents is not None:
        offsets = batch.documents.offsets.long()
    (trained,) = (batch.labels.flatten() != IGNORED).nonzero(as_tuple=True)
    (read,) = (batch.input_ids.flatten() != pad_id).nonzero(as_tuple=True)
    ends = _last(trained, offsets[1:] - 1)
    starts, ends = offsets[:-1][ends >= offsets[:-1]], ends[ends >= offsets[:-1]]
    last = _last(read, ends)
    return torch.where(last >= starts, last, ends)  # of padding alone it is its end


def _last(places: Tensor, bounds: Tensor) -> Tensor:
    """Return the last of `places`, ascending (N,), up to each bound (A,); -1 where there is none."""
    before = torch.cat([places.new_full((1,), -1), places])
    return before[torch.searchsorted(places, bounds, right=True)]


@torch.no_grad()
def scores(model: PreTrainedModel, ids: Tensor, weight: Tensor) -> Tensor:
    """Return the score at every token, (B, T) -> (B, T) float32, of rows without padding."""
    states = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return nn.functional.linear(states.float(), weight.to(states.device)).squeeze(-1)


def read_weight(folder: Path) -> Tensor | None:
    """Return the head, (1, H) float32, of a PEFT adapter or a model in `folder`; None where it has none.

    Raises:
        InputError: it cannot be read, is for several labels, or is not finite.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                name = next((one for one in _NAMES if one in tensors.keys()), None)  # noqa: SIM118
                weight: Tensor | None = None if name is None else tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from error
        if weight is None:
            continue
        if weight.dim() != 2 or len(weight) != 1 or not weight.is_floating_point():
            raise InputError(
                f"{path}: tensor {name} has shape {tuple(weight.shape)}, of a reward model it is (1, hidden size)"
            )
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"{path}: tensor {name} holds values that are not finite")
        return weight.float().clone()  # no page of the file, which may be written anew
    return None


def require_classifier(model: PreTrainedModel) -> None:
    """Refuse a model of which transformers has no sequence classifier that the head would fit into.

    Raises:
        InputError: with what is in the way.
    """
    kind = model.config.model_type
    reason = None
    if type(model.config) not in AutoModelForSequenceClassification._model_mapping:
        reason = "transformers has no sequence classifier of its kind"
    elif type(_shell(model, 0).base_model) is not type(model.base_model):
        reason = "its sequence classifier has another decoder"
    elif not isinstance(getattr(_shell(model, 0), "score", None), nn.Linear):
        reason = "its sequence classifier has no head called score"
    if reason is not None:
        raise InputError(
            f"objective.name: found reward, but of {kind} no reward model can be saved: {reason}"
        )


def classifier(model: PreTrainedModel, head: ScoreHead) -> PreTrainedModel:
    """Return the sequence classifier that has the decoder of `model`, the very one, and this head."""
    made = _shell(model, head.pad_id)
    setattr(made, made.base_model_prefix, model.base_model)
    score: Any = made.score
    score.weight = nn.Parameter(head.weight.detach().cpu().clone(), requires_grad=False)
    return made


def _shell(model: PreTrainedModel, pad_id: int) -> PreTrainedModel:
    """Return a sequence classifier of one label without any weight."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    config.pad_token_id = config.get_text_config().pad_token_id = pad_id
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return made
