"""That two sides did the same work: the same documents in every step, the same losses and gradients.

Documents are compared by hash and count, exactly. Losses and gradient norms agree up to the rounding of the type that
is computed in; float32 shows that the mathematics is the same, bfloat16 that nothing was left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from side_by_side.records import Document, Record, UnequalError, digest

LOSS = {"bfloat16": 3e-3, "float32": 1e-5}
"""Largest difference of a step's loss, relative."""
ROUNDED = 3 * 2.0**-8
"""The same of a loss whose tokens, sum and mean are each rounded to bfloat16."""
NORM = {"bfloat16": 1e-2, "float32": 1e-3}
"""Largest difference of a step's gradient norm, relative; a lost gradient of one layer in a hundred shows."""


def require_documents(name: str, record: Record, work: Sequence[Sequence[Document]]) -> None:
    """Refuse a side that consumed other documents than the file has for the step.

    Raises:
        UnequalError: which step, and what was found.
    """
    for number, (step, documents) in enumerate(zip(record.steps, work, strict=False), 1):
        sha, real, labelled = digest(list(documents))
        if (step.real_tokens, step.labelled_tokens) != (real, labelled):
            raise UnequalError(
                f"{name}, step {number}: consumed {step.real_tokens} tokens, {step.labelled_tokens} of them labelled;"
                f" the file has {real} and {labelled}"
            )
        if step.sha256 != sha:
            raise UnequalError(
                f"{name}, step {number}: consumed other documents than the file has ({sha[:12]})"
            )


def require_numbers(
    name: str, record: Record, ours: Record, dtype: str, *, norms: bool, rounded: bool = False
) -> None:
    """Refuse a side whose losses or, with `norms`, gradient norms are not ours; `rounded`: it rounds its losses.

    Raises:
        UnequalError: which step, and both numbers.
    """
    loss = ROUNDED if rounded and dtype == "bfloat16" else LOSS[dtype]
    kinds = [("loss", loss)] + ([("grad_norm", NORM[dtype])] if norms else [])
    for number, (theirs, mine) in enumerate(zip(record.steps, ours.steps, strict=False), 1):
        for kind, most in kinds:
            one, other = getattr(theirs, kind), getattr(mine, kind)
            # Written so that a NaN on either side is refused.
            if not abs(one - other) <= most * abs(other):
                raise UnequalError(
                    f"{name}, step {number}: {kind} {one:.6f}, ours is {other:.6f}, more than {most:g} apart"
                )


def largest_difference(record: Record, ours: Record) -> float:
    """Return the largest relative difference of a step's loss."""
    pairs = zip(record.steps, ours.steps, strict=False)
    return max(abs(theirs.loss - mine.loss) / abs(mine.loss) for theirs, mine in pairs)
