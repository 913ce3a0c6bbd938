"""AdamW over float32 master weights, with gradients accumulated in float32.

A trained weight that is float32 (every adapter weight) is its own master. A bfloat16 weight (full fine-tuning) has a
float32 master: its updates would otherwise be rounded away, as bfloat16 keeps 8 bits and a step changes a weight by
about 1e-4 of itself. Its gradient moves into the master as soon as autograd has formed it, so that the sum over
micro-batches is exact to float32 and no second copy of all gradients is alive.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MasterAdamW:
    """AdamW (arXiv 1711.05101) on named parameters; `masters` are float32, one per parameter.

    `rate_factors` multiply the learning rate of single parameters, 1 where a name is not in it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
            else:
                master = parameter.detach().float()
                self.masters[name] = master
                parameter.register_post_accumulate_grad_hook(_move_gradient_to(master))
        factors = rate_factors or {}
        groups: dict[float, list[Tensor]] = {}
        for name, master in self.masters.items():
            groups.setdefault(factors.get(name, 1.0), []).append(master)
        self._adamw = torch.optim.AdamW(
            [{"params": masters, "rate_factor": factor} for factor, masters in groups.items()],
            lr=0.0,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
        )

    def gradients(self) -> list[Tensor]:
        """Return every float32 gradient, in the parameters' order; one that autograd did not reach is zero."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values() if master.grad is not None]

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
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]
        self._adamw.step()
        # The fused kernel leaves the version counters as they were; what is computed from a weight is kept by them.
        torch.autograd.graph.increment_version(list(self.masters.values()))
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return `exp_avg` and `exp_avg_sq` of a weight, to be changed in place; empty before its first step."""
        state = self._adamw.state.get(self.masters[name], {})
        return {key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for master in self.masters.values():
            master.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return masters and moments as flat named tensors: `<name>.{master,exp_avg,exp_avg_sq,step}`."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            state[f"{name}.master"] = master.detach()
            for key, value in self._adamw.state.get(master, {}).items():
                state[f"{name}.{key}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, and write the masters into the model's weights."""
        for name, master in self.masters.items():
            master.copy_(state[f"{name}.master"])
            self.parameters[name].copy_(master)
            moments = {key: state.get(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in moments.values()):
                self._adamw.state[master] = {
                    # AdamW's fused kernel wants its step counter as float32 on the parameter's device.
                    key: value.clone().to(master.device)
                    for key, value in moments.items()
                    if value is not None
                }


def _move_gradient_to(master: Tensor):  # type: ignore[no-untyped-def]
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return move
