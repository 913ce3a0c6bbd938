"""LitGPT's side: its GPT with LoRA and its chunked loss, in the steps of its own fine-tuning loop.

The model is the case's: weights and adapters are laid out as LitGPT has them, q, k and v in one matrix. Two departures
from its loop, for equal work: a micro-batch counts by its labelled tokens, and gradients are clipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from side_by_side.peft_side import micro_batches
from side_by_side.records import IGNORED, Job, Recorder, UnequalError, measure, read_work
from side_by_side.shapes import sizes

PARTS = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
"""LitGPT's name of a linear layer, and transformers'."""


def run(job: Job, recorder: Recorder) -> None:
    """Make the case's steps."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    shape = sizes(Path(job.model))
    if shape["model_type"] != "llama":
        raise UnequalError(
            f"its layout of {shape['model_type']} is not written down here, only that of llama"
        )
    rope = shape.get("rope_parameters") or {"rope_theta": shape["rope_theta"]}
    default, dtype = torch.get_default_dtype(), getattr(torch, job.dtype)
    torch.set_default_dtype(dtype)  # bf16-true is all of the model in bfloat16
    with torch.device(job.device):
        model = GPT(
            Config(
                name="side by side", hf_config={}, block_size=shape["max_position_embeddings"],
                vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"],
                n_layer=shape["num_hidden_layers"], n_head=shape["num_attention_heads"],
                n_query_groups=shape["num_key_value_heads"], n_embd=shape["hidden_size"],
                head_size=shape["head_dim"], intermediate_size=shape["intermediate_size"], rotary_percentage=1.0,
                rope_base=int(rope["rope_theta"]), parallel_residual=False, bias=False, norm_class_name="RMSNorm",
                norm_eps=shape["rms_norm_eps"], mlp_class_name="LLaMAMLP", lora_r=job.rank,
                lora_alpha=int(job.alpha), lora_query=True, lora_key=True, lora_value=True, lora_projection=True,
                lora_mlp=True,
            )
        )  # fmt: skip
    torch.set_default_dtype(default)
    mark_only_lora_as_trainable(model)
    assert job.start is not None
    state = weights(
        load_file(Path(job.model) / "model.safetensors"), load_file(job.start), shape["num_hidden_layers"]
    )
    model.load_state_dict(state)
    model.train()
    work = read_work(job.work)[: job.steps]
    model.max_seq_length = max(len(ids) for step in work for ids, _ in step)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0, fused=True)
    recorder.begin()
    for documents in work:
        batches = list(micro_batches(documents, 8, job.device))
        units = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels, _ in batches)
        for ids, labels, mask in batches:
            recorder.see(ids, labels, mask=mask)
            logits = model(ids, lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            share = (labels[:, 1:] != IGNORED).sum() / units
            loss = chunked_cross_entropy(logits, labels[..., 1:]) * share
            loss.backward()
            recorder.add_loss(loss.detach())
        recorder.norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recorder.end()


def weights(theirs: dict[str, Any], start: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return LitGPT's state of a llama checkpoint by transformers' names and of adapters by ours."""
    embedding = theirs["model.embed_tokens.weight"]
    state = {
        "transformer.wte.weight": embedding,
        "transformer.ln_f.weight": theirs["model.norm.weight"],
        "lm_head.linear.weight": theirs.get("lm_head.weight", embedding),
    }
    for number in range(layers):
        source, target = f"model.layers.{number}", f"transformer.h.{number}"
        state[f"{target}.norm_1.weight"] = theirs[f"{source}.input_layernorm.weight"]
        state[f"{target}.norm_2.weight"] = theirs[f"{source}.post_attention_layernorm.weight"]
        attention = [f"{source}.self_attn.{part}_proj" for part in "qkv"]
        for name, table, form in (
            ("linear.weight", theirs, "{}.weight"),
            ("lora_A", start, "{}.lora_A"),
            ("lora_B", start, "{}.lora_B"),
        ):
            state[f"{target}.attn.qkv.{name}"] = torch.cat([table[form.format(one)] for one in attention])
            for part, own in PARTS.items():
                state[f"{target}.{part}.{name}"] = table[form.format(f"{source}.{own}")]
    return state


if __name__ == "__main__":
    measure(run)
