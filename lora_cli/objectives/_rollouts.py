"""What objectives have in common that learn from completions of their own: they are sampled in `micro_batches`.

A rollout is what one state of the model makes of the prompts of a step: completions, their rewards, and of each of
their tokens what the updates need of that state. It serves `updates_per_rollout` steps, which get the same rows. It is
a function of the seed, its first step and the weights; between two steps of one rollout it is part of the checkpoint.

A row is a prompt and its last answer, the reference that rewards may compare with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives import _rewards
from lora_cli.objectives._base import Items, Metrics, Objective, Surroundings
from lora_cli.objectives._completions import complete
from lora_cli.objectives._policy_losses import divergence, is_clipped
from lora_cli.objectives._prompts import split_answer
from lora_cli.objectives._rollout import Rollout, RolloutBatch, batches_of, score
from lora_cli.objectives._rollout_lines import lines_of
from lora_cli.recipe import rollout_blocks
from lora_cli.types import Batch, Conversation, Prepared, Progress, Scores


class RolloutObjective(Objective):
    """An objective over sampled completions; `samples` of each prompt."""

    consumes = (Conversation,)
    online = True
    told: ClassVar[tuple[str, ...]] = ("kl", "clip_fraction")
    """What `policy_loss` notes by `report`, as sums over tokens."""

    def __init__(
        self, settings: rollout_blocks.RolloutObjective, *, pad_id: int, samples: int, beta: float
    ) -> None:
        self.sampling, self.pad_id, self.samples, self.beta = settings.sampling, pad_id, samples, beta
        self.updates_per_rollout = settings.updates_per_rollout
        self.low = settings.clip_low
        self.high = settings.clip_low if settings.clip_high is None else settings.clip_high
        self.needs_reference = beta > 0
        self._wanted_rewards = settings.rewards
        self._rewards: list[_rewards.Term] = []
        self._around: Surroundings | None = None
        self._rollout: Rollout | None = None
        self._saved: Mapping[str, Tensor] = {}
        self._told = -1
        self._sums: dict[str, list[Tensor]] = {}

    @abstractmethod
    def measure(self, model: AdaptedModel, rollout: Rollout, tokens: int) -> None:
        """Add what the model gives each token of a new rollout to its columns, where it is to stop not all of it."""

    @abstractmethod
    def settle(self, rollout: Rollout) -> None:
        """Add what follows from rewards and measures, `advantages` among it; processes may sum over all of them."""

    @abstractmethod
    def policy_loss(self, model: AdaptedModel, batch: RolloutBatch) -> Tensor:
        """Return the summed loss of a micro-batch, and `report` what is told of it."""

    # What the pipeline asks for.

    def begin(self, around: Surroundings) -> None:
        """Take what the run is surrounded by, and make the rewards.

        Raises:
            InputError: a reward is Python code that may not run, or cannot be loaded.
        """
        self._around = around
        self._rewards = _rewards.build(
            self._wanted_rewards, allow_code=around.allow_code, open_scorer=around.open_scorer
        )
        self.reported = (*self._names(), "completion_tokens", "ended")

    def require_rows(self, prepared: Prepared) -> int:
        """Return the most tokens that a prompt and its completion can have.

        Raises:
            InputError: a row has no prompt, or an answer that a reward cannot compare with.
        """
        _rewards.load(self._rewards, prepared.stop_ids)
        longest = 0
        for examples in filter(None, (prepared.train, prepared.eval)):
            for row in range(len(examples)):
                prompt, reference = split_answer(*examples[row].answers())
                longest = max(longest, len(prompt))
                try:
                    if not len(prompt):
                        raise InputError("has nothing before its answer to complete (give a prompt)")
                    _rewards.require_comparable(
                        self._rewards, partial(self.around.text, reference), len(reference)
                    )
                except InputError as fault:
                    raise InputError(f"{examples.where(row)}: {fault}") from None
        return longest + self.sampling.max_new_tokens

    def contents(self) -> dict[str, str]:
        """Return a sha256 of the reward models, where there are any."""
        return _rewards.contents(self._rewards)

    # What the loop asks for.

    def micro_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return the completions of the rows' prompts as micro-batches; the first call of a rollout samples them.

        Where a process is to stop meanwhile there are none, in all processes, and the next call samples them again.
        """
        self._sums = {}
        index = progress.step // self.updates_per_rollout
        if self._rollout is None or self._rollout.index != index:
            self._rollout = Rollout.restored(self._saved, rows, index)
            self._saved = {}
            if self._rollout is None:
                self._rollout = self._roll_out(model, rows, index, tokens)
            else:
                self._told = index
        if self._rollout is None:
            return []
        return list(batches_of(model, self._rollout, tokens=tokens, pad_id=self.pad_id))

    def trial_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return the rows themselves as if they had been sampled, of no advantage: what they cost is what is asked."""
        del progress
        self._sums = {}
        rollout = Rollout.of_rows(rows)
        zeros = torch.zeros(rollout.tokens)
        rollout.columns = dict.fromkeys(("old", "reference", "advantages", "values", "returns"), zeros)
        return list(batches_of(model, rollout, tokens=tokens, pad_id=self.pad_id))

    def heldout_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return the rows' most likely completions, whose loss is less the sum of their rewards; none where it is to
        stop meanwhile."""
        del progress
        rollout = complete(
            model, rows, self.sampling, self._rewards, self.around,
            samples=1, step=0, greedy=True, pad_id=self.pad_id, tokens=tokens,
        )  # fmt: skip
        if rollout is None:
            return []
        batches = list(batches_of(model, rollout, tokens=tokens, pad_id=self.pad_id))
        for batch in batches:
            batch.rewards = rollout.rewards[list(batch.samples)]
        return list(batches)

    def loss_sum(self, model: AdaptedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the summed loss; of held-out completions less their reward, and sums over them to report."""
        assert isinstance(batch, RolloutBatch)
        if batch.rewards is None:
            return self.policy_loss(model, batch), {}
        weights = torch.tensor([term.weight for term in self._rewards], dtype=torch.float64)
        counts = torch.tensor([sum(batch.lengths), sum(batch.ended)], dtype=torch.float64)
        sums = torch.cat([batch.rewards.sum(dim=0), counts])
        return -(batch.rewards @ weights).sum().float(), dict(zip(self.reported, sums, strict=True))

    def tokens(self, rows: Items, batches: Sequence[Batch]) -> int:
        """Return the tokens of prompts and completions, padding aside."""
        del rows
        return sum(one.real_tokens for one in batches if isinstance(one, RolloutBatch))

    def scores(self, means: Mapping[str, float]) -> Scores:
        """Return the mean reward, its terms, and length and end of the completions."""
        rest = {name: value for name, value in means.items() if name != "loss"}
        return {"reward": -means["loss"], **rest}

    # What is told.

    def report(self, name: str, values: Tensor) -> None:
        """Note values of tokens, (...,), for the metrics of the step."""
        self._sums.setdefault(name, []).append(values.detach().sum())

    def step_metrics(self) -> dict[str, tuple[float, float]]:
        """Return the sums of a step and what they are divided by, under the same names in every process."""
        rollout = self._rollout
        assert rollout is not None
        count, weights = float(len(rollout.rows)), [term.weight for term in self._rewards]
        each = rollout.rewards.sum(dim=0).tolist()
        found = {"reward": (sum(w * one for w, one in zip(weights, each, strict=True)), count)}
        found |= {name: (one, count) for name, one in zip(self._names(), each, strict=True)}
        found["completion_tokens"] = (float(rollout.tokens), count)
        found["ended"] = (float(sum(rollout.ended)), count)
        found["entropy"] = (float(rollout.entropies.sum()), float(rollout.tokens))
        for name in self.told:
            found[name] = (sum(float(one) for one in self._sums.get(name, [])), float(rollout.tokens))
        return found

    def new_lines(self) -> list[list[str]]:
        """Return what was sampled since it was asked last, as JSON: a line of each completion, by prompt."""
        rollout = self._rollout
        if rollout is None or rollout.index == self._told:
            return []
        self._told = rollout.index
        step = rollout.index * self.updates_per_rollout + 1
        weights = [term.weight for term in self._rewards]
        return lines_of(rollout, step, self._names(), weights, self.around.text)

    # What a checkpoint holds.

    def state_dict(self, step: int) -> dict[str, Tensor]:
        """Return the rollout of the step to come, where one that was made has it; else nothing."""
        rollout = self._rollout
        if rollout is None or rollout.index != step // self.updates_per_rollout:
            return {}
        return rollout.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what checkpoints of all processes held; each finds its own rows in it."""
        self._rollout, self._saved = None, {name: tensor.clone() for name, tensor in state.items()}

    # How a rollout is made.

    def _roll_out(self, model: AdaptedModel, rows: Items, index: int, tokens: int) -> Rollout | None:
        """Return what the model makes of the rows; None in all processes where one is to stop meanwhile."""
        step = index * self.updates_per_rollout
        rollout = complete(
            model, rows, self.sampling, self._rewards, self.around,
            samples=self.samples, step=step, greedy=False, pad_id=self.pad_id,
        )  # fmt: skip
        if rollout is not None:
            with model.evaluating():
                self.measure(model, rollout, tokens)
        # Agreed on before any of them waits for the sums of the others.
        (stopping,) = self.around.sum([float(self.around.stopping())])
        if stopping:
            return None
        assert rollout is not None
        rollout.index = index
        self.settle(rollout)
        return rollout

    def score(
        self,
        model: AdaptedModel,
        rollout: Rollout,
        names: tuple[str, ...],
        function: Callable[[RolloutBatch], tuple[Tensor, ...]],
        tokens: int,
    ) -> None:
        """Add columns of these names, see `_rollout.score`."""
        stopping = self.around.stopping
        score(model, rollout, names, function, tokens=tokens, pad_id=self.pad_id, stopping=stopping)

    def score_policy(self, model: AdaptedModel, rollout: Rollout, tokens: int, *, old: bool) -> None:
        """Add the log-probabilities of the model itself where `old`, and of its reference where `beta` is not 0.

        They are made as those of training are, not taken from the sampler: at the first update the ratio is 1 to the
        last bits, also in bfloat16, where a cache of keys and values rounds differently.
        """

        def logps(batch: RolloutBatch) -> tuple[Tensor]:
            return (-model.token_losses(batch)[0],)

        if old:
            self.score(model, rollout, ("old",), logps, tokens)
        if self.beta:
            with model.as_it_began():
                self.score(model, rollout, ("reference",), logps, tokens)

    def report_policy(self, logps: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor) -> None:
        """Note clipped part of tokens and divergence from the reference, (N,) each.

        That is of the model that drew: of a later one these tokens are no sample, and an estimate from them has no
        bound.
        """
        with torch.no_grad():
            self.report("clip_fraction", is_clipped(logps, old, advantages, self.low, self.high))
            if reference is not None:
                self.report("kl", divergence(old, reference))

    def totals(self, rollout: Rollout) -> Tensor:
        """Return what each completion is worth, (S,) float32."""
        weights = torch.tensor([term.weight for term in self._rewards], dtype=torch.float64)
        return (rollout.rewards @ weights).float()

    @property
    def around(self) -> Surroundings:
        """What the run is surrounded by, once it has begun."""
        assert self._around is not None
        return self._around

    def _names(self) -> list[str]:
        return [f"reward_{term.name}" for term in self._rewards]
