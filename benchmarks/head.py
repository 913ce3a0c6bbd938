"""Milliseconds of an output head's losses and gradients, ours beside all logits, torch's chunks and TRL's, in turn.

    python benchmarks/head.py                                        # SmolLM-135M's head, 512 trained tokens
    python benchmarks/head.py --tokens 2048 --width 2048 --vocabulary 128256 --trained

Each way makes the losses of the same hidden states forward and backward, then the next way does, and so on, so that a
slow second falls on all. A ratio is that of two which stood side by side; printed are medians, and how far the loss is
from that of all logits. TRL is timed where it is installed, with the outputs that its SFTTrainer asks for.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.models.linear_cross_entropy import token_losses
from lora_cli.runtime.log import Stopwatch

Loss = Callable[[Tensor, Tensor, nn.Linear], Tensor]
"""(N, H), (N,), head -> the sum of the losses."""


def ours(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    """Return the sum of this tool's losses."""
    return token_losses(hidden, targets, head)[0].sum()


def all_logits(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    """Return torch's cross-entropy of all logits, as transformers computes it."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def ways(dtype: torch.dtype) -> dict[str, Loss]:
    """Return what can be timed here, by name."""
    found: dict[str, Loss] = {"ours": ours, "all logits": all_logits}
    if hasattr(nn, "LinearCrossEntropyOptions"):  # torch 2.13
        options = nn.LinearCrossEntropyOptions(acc_policy="balanced")

        def torchs(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
            return F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", options=options)

        found["torch, balanced chunks"] = torchs
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError:
        return found

    def trls(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
        scores = ChunkedLogProbFunction.apply(
            hidden, head.weight, None, targets, 1.0, 32768, None, 1.0, ("entropy", "is_top1")
        )
        return -scores[0].sum()

    return found | {"TRL, chunks": trls}


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the ways in turn and print a line for each."""
    parser = argparse.ArgumentParser(description="Time the losses of an output head, side by side.")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--trained", action="store_true", help="the head's own gradient too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    torch.manual_seed(0)
    head = nn.Linear(options.width, options.vocabulary, bias=False, dtype=dtype, device=device)
    head.requires_grad_(options.trained)
    hidden = torch.randn(options.tokens, options.width, device=device).to(dtype).requires_grad_()
    targets = torch.randint(options.vocabulary, (options.tokens,), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in ways(dtype)}
    losses: dict[str, float] = {}
    for turn in range(options.rounds + 1):
        watch = Stopwatch()
        for name, way in ways(dtype).items():
            hidden.grad = head.weight.grad = None
            loss = way(hidden, targets, head)
            (loss / options.tokens).backward()
            losses[name] = float(loss.detach()) / options.tokens  # a GPU has finished here
            if turn:
                seconds[name].append(watch.lap())
            else:
                watch.lap()
    for name, laps in seconds.items():
        ratio = statistics.median(lap / own for lap, own in zip(laps, seconds["ours"], strict=True))
        off = abs(losses[name] / losses["all logits"] - 1)
        print(
            f"{name:<24} {statistics.median(laps) * 1e3:9.1f} ms   {ratio:6.2f} times ours   loss off {off:.1e}"
        )


if __name__ == "__main__":
    main()
