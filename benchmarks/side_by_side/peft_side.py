"""PEFT's side: a plain loop over transformers' model and loss, as lean as its parts allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from side_by_side import peft_methods
from side_by_side.records import IGNORED, Document, Job, Recorder, measure, read_work


def run(job: Job, recorder: Recorder) -> None:
    """Make the case's steps."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, job.dtype)
    quantized = peft_methods.quantization(job, bf16_compute=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=dtype,
        attn_implementation=job.options.get("attention", "sdpa"),
        quantization_config=quantized,
        use_safetensors=True,
    )
    if quantized is None:
        model.to(job.device)
    settings = peft_methods.config(job, job.options["adapter"])
    inner = model
    if settings is not None:
        # Adapters in the model's type: nothing is cast in a forward pass, and there are no float32 masters.
        model = get_peft_model(model, settings, autocast_adapter_dtype=False)
        assert job.start is not None
        peft_methods.fill(model, job.start)
    if job.options.get("compile"):
        for layer in inner.model.layers:
            layer.compile(dynamic=True)
    model.train()
    watch_loss(inner, recorder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0, fused=True)
    recorder.begin()
    for number, documents in enumerate(read_work(job.work)[: job.steps]):
        batches = list(micro_batches(documents, 8, job.device))
        units = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels, _ in batches)
        if job.method == "adalora":
            # PEFT adds the penalty once a pass; it counts once a step.
            settings.orth_reg_weight = 0.5 / len(batches)
        for ids, labels, mask in batches:
            recorder.see(ids, labels, mask=mask)
            model(
                input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=units, use_cache=False
            ).loss.backward()
        recorder.norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if job.method == "adalora":
            model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
        recorder.end()


def watch_loss(model: Any, recorder: Recorder) -> None:
    """Record the loss of every forward pass of transformers' model, before PEFT adds a penalty to it in place."""
    forward = model.forward

    def watched(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        recorder.add_loss(output.loss.detach().clone())
        return output

    model.forward = watched


def micro_batches(
    documents: Sequence[Document], rows: int, device: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids, labels and mask (B, T) of `rows` documents of like length at a time, padded at the right."""
    ordered = sorted(documents, key=lambda document: -len(document[0]))
    for first in range(0, len(ordered), rows):
        ids, labels = (
            [torch.from_numpy(document[part]) for document in ordered[first : first + rows]]
            for part in (0, 1)
        )
        mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        padded = (
            pad_sequence(ids, batch_first=True),
            pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        )
        yield padded[0].to(device), padded[1].to(device), mask.to(device)


if __name__ == "__main__":
    measure(run)
