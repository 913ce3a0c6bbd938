"""AdamW over float32 master weights, with gradients accumulated in float32.

A trained weight that is float32 (every adapter weight) is its own master. A bfloat16 weight (full fine-tuning) has a
float32 master: its updates would otherwise be rounded away, as bfloat16 keeps 8 bits and a step changes a weight by
about 1e-4 of itself. Its gradient moves into float32 as soon as autograd has formed it, so that the sum over
micro-batches is exact to float32 and no second copy of all gradients is alive.

Without masters an updated bfloat16 weight is rounded stochastically (`_rounding.py`), by a stream that is a function of
the seed, the weight's name and its number of updates. The moments are float32 or 8 bits a value (`_moments.py`).

Bytes of a bfloat16 weight, its gradient and what is kept of it:

    2 + 4 + 12    masters, float32 moments
    2 + 4 +  8    no masters
    2 + 4 +  6    masters, 8-bit moments
    2 + 4 +  2    neither
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lora_cli.errors import InputError
from lora_cli.runtime._moments import BLOCK, SMALLEST, EightBitMoments, Moments
from lora_cli.runtime._rounding import stochastic_round
from lora_cli.seeding import stream_seed

_PART = BLOCK << 12
"""Values updated at once where something is converted for it: bounds the float32 temporaries to some 20 MB."""


class TrainedWeight:
    """One weight that is updated: its master, its float32 gradient and its moments."""

    def __init__(
        self, parameter: nn.Parameter, *, rate_factor: float, decayed: bool, keep_master: bool
    ) -> None:
        self.parameter, self.rate_factor, self.decayed = parameter, rate_factor, decayed
        is_float32 = parameter.dtype == torch.float32
        self.rounded = not (is_float32 or keep_master)
        """True: there is no master, and an update is rounded to the weight's own type."""
        self.master: Tensor = parameter if is_float32 or self.rounded else parameter.detach().float()
        self.moments: Moments | None = None
        """None before the first update."""
        self.updates = 0
        self._gradient: Tensor | None = None
        self._hook = None if is_float32 else parameter.register_post_accumulate_grad_hook(self._take_gradient)

    @property
    def gradient(self) -> Tensor | None:
        """The gradient in float32, of the weight's shape; None where autograd did not reach the weight."""
        return self.parameter.grad if self._hook is None else self._gradient

    def fill_gradient(self) -> Tensor:
        """Return the gradient, made zero where there is none."""
        if self.gradient is None:
            zeros = torch.zeros_like(self.master, dtype=torch.float32)
            if self._hook is None:
                self.parameter.grad = zeros
            else:
                self._gradient = zeros
        assert self.gradient is not None
        return self.gradient

    def forget_gradient(self) -> None:
        """Forget the gradient."""
        self.parameter.grad = self._gradient = None

    def release(self) -> None:
        """Leave the gradient to autograd again."""
        if self._hook is not None:
            self._hook.remove()

    def _take_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if self._gradient is None:
            self._gradient = parameter.grad.float()
        else:
            self._gradient += parameter.grad
        parameter.grad = None


class MasterAdamW:
    """AdamW (arXiv 1711.05101) on named parameters, see `set_parameters`.

    `eight_bit`: moments in 8 bits a value. `keep_masters` false: bfloat16 weights without masters, rounded by `seed`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rate_factors: Mapping[str, float] | None = None,
        undecayed: Collection[str] = (),
        eight_bit: bool = False,
        keep_masters: bool = True,
        seed: int = 0,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.eight_bit, self.keep_masters, self.seed = eight_bit, keep_masters, seed
        self.weights: dict[str, TrainedWeight] = {}
        self.masters: dict[str, Tensor] = {}
        """What is updated: float32, or without masters the bfloat16 parameters themselves."""
        self.set_parameters(parameters, rate_factors=rate_factors, undecayed=undecayed)

    def set_parameters(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        rate_factors: Mapping[str, float] | None = None,
        undecayed: Collection[str] = (),
    ) -> None:
        """Update these from now on, without moments; what is kept of the weights before is released.

        `rate_factors` multiply the learning rate of single parameters, 1 where a name is not in it. There is no weight
        decay on those in `undecayed`.
        """
        for weight in self.weights.values():
            weight.release()
        factors = rate_factors or {}
        self.weights = {
            name: TrainedWeight(
                parameter,
                rate_factor=factors.get(name, 1.0),
                decayed=name not in undecayed,
                keep_master=self.keep_masters,
            )
            for name, parameter in parameters.items()
        }
        self.masters = {name: weight.master for name, weight in self.weights.items()}

    def updates(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Say whether these and no others are updated."""
        mine = {name: id(weight.parameter) for name, weight in self.weights.items()}
        return mine == {name: id(parameter) for name, parameter in parameters.items()}

    def gradients(self) -> list[Tensor]:
        """Return every float32 gradient, in the parameters' order; one that autograd did not reach is zero."""
        return [weight.fill_gradient() for weight in self.weights.values()]

    def gradient_norm(self) -> Tensor:
        """Return the global 2-norm of all gradients, 0-d float32."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.gradients())))

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients so that their global norm is at most `max_norm`."""
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(self.gradients(), scale)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply one update and write the masters back into the model's weights."""
        together: dict[tuple[float, float], list[TrainedWeight]] = {}
        for name, weight in self.weights.items():
            if weight.gradient is None:
                continue
            rate = learning_rate * weight.rate_factor
            decay = self.weight_decay if weight.decayed else 0.0
            if weight.moments is None:
                weight.moments = self._new_moments(weight)
            weight.updates += 1
            if weight.rounded or isinstance(weight.moments, EightBitMoments):
                self._update_in_parts(name, weight, rate, decay)
            else:
                together.setdefault((rate, decay), []).append(weight)
        for (rate, decay), weights in together.items():
            moments = [weight.moments for weight in weights if weight.moments is not None]
            self._adamw(
                [weight.master for weight in weights],
                [weight.fill_gradient() for weight in weights],
                [each.exp_avg for each in moments],
                [each.exp_avg_sq for each in moments],
                [each.step for each in moments],
                rate,
                decay,
            )
        # The fused kernel leaves the version counters as they were; what is computed from a weight is kept by them.
        torch.autograd.graph.increment_version(list(self.masters.values()))
        for weight in self.weights.values():
            if weight.parameter is not weight.master:
                weight.parameter.copy_(weight.master)

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return `exp_avg` and `exp_avg_sq` of a weight, float32, for `set_moments`; empty before its first step."""
        weight = self.weights[name]
        if weight.moments is None:
            return {}
        exp_avg, exp_avg_sq = (moment.view(weight.master.shape) for moment in weight.moments.read())
        return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Store what `moments` returned and was then changed in place; nothing where that was empty."""
        stored = self.weights[name].moments
        if stored is not None:
            stored.write(moments["exp_avg"], moments["exp_avg_sq"])

    def bytes_to_come(self) -> int:
        """Return how many bytes the moments will take that no update has made yet; scales and small weights aside."""
        of_value = 2 if self.eight_bit else 8
        return sum(each.master.numel() * of_value for each in self.weights.values() if each.moments is None)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for weight in self.weights.values():
            weight.forget_gradient()

    def state_dict(self) -> dict[str, Tensor]:
        """Return masters and moments as flat named tensors.

        `<name>.{master,exp_avg,exp_avg_sq,step}`; moments in 8 bits are uint8, and have `exp_avg_scale` and
        `exp_avg_sq_scale` besides.
        """
        state: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            state[f"{name}.master"] = weight.master.detach()
            if weight.moments is not None:
                state |= {f"{name}.{key}": value for key, value in weight.moments.tensors().items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, and write the masters into the model's weights.

        Raises:
            InputError: it is of other weights, or holds them in another form.
        """
        kept: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            weight.moments, weight.updates = None, 0
            kept[f"{name}.master"] = weight.master
            if f"{name}.step" in state:
                weight.moments = self._new_moments(weight)
                weight.updates = int(state[f"{name}.step"])
                kept |= {f"{name}.{key}": value for key, value in weight.moments.tensors().items()}
        # A copy alone would repeat a row of rank 1 over a larger one, and take bytes for numbers.
        forms = ({name: (value.shape, value.dtype) for name, value in one.items()} for one in (kept, state))
        if unlike := [name for name, _ in set.symmetric_difference(*(set(form.items()) for form in forms))]:
            raise InputError(
                f"the checkpoint's optimizer is of other weights than the model's, e.g. {min(unlike)} (use the recipe"
                " that it was written under)"
            )
        for name, value in kept.items():
            value.copy_(state[name])
        for weight in self.weights.values():
            if weight.parameter is not weight.master:
                weight.parameter.copy_(weight.master)

    def _new_moments(self, weight: TrainedWeight) -> Moments:
        small = weight.master.numel() < SMALLEST
        return Moments(weight.master) if small or not self.eight_bit else EightBitMoments(weight.master)

    def _update_in_parts(self, name: str, weight: TrainedWeight, rate: float, decay: float) -> None:
        """Update a weight that is no float32 itself, or whose moments are not, a part at a time."""
        moments, master = weight.moments, weight.master.view(-1)
        assert moments is not None
        gradient = weight.fill_gradient().reshape(-1)
        generator = torch.Generator(master.device)
        if weight.rounded:
            generator.manual_seed(stream_seed(self.seed, "rounding", name, weight.updates))
        for first in range(0, len(master), _PART):
            part = slice(first, min(first + _PART, len(master)))
            exact = master[part].float()  # the master's own values where they are float32
            exp_avg, exp_avg_sq = moments.read(part)
            step = moments.step.clone()  # the same for every part
            self._adamw([exact], [gradient[part]], [exp_avg], [exp_avg_sq], [step], rate, decay)
            moments.write(exp_avg, exp_avg_sq, part)
            if weight.rounded:
                master[part] = stochastic_round(exact, generator)
        moments.step += 1

    def _adamw(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        rate: float,
        decay: float,
    ) -> None:
        """Update float32 weights, moments and steps in place by torch's fused kernel."""
        adamw(
            weights, gradients, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, maximize=False,
            beta1=self.betas[0], beta2=self.betas[1], eps=self.eps, lr=rate, weight_decay=decay,
        )  # fmt: skip
