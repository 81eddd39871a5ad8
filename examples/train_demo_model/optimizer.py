"""Muon for the weight matrices of the layers, AdamW for everything else."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MUON_RATE, MUON_MOMENTUM, MUON_DECAY = 0.02, 0.95, 0.02
ADAM_RATES = {"embed_tokens": 4e-3, "lm_head": 3e-3, "gate.weight": 1e-3, "norm": 3e-3}


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, by five Newton-Schulz steps (Keller Jordan's coefficients)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if is_wide else matrices.mT
    x = x / (x.square().sum(dim=(-2, -1), keepdim=True).sqrt() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if is_wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (K. Jordan et al., 2024). A stack of matrices is one parameter; fused ones are split."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": MUON_RATE})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"])

    def _update(self, parameter: nn.Parameter, rate: float) -> None:
        grad = parameter.grad
        assert grad is not None
        momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(grad))
        momentum.lerp_(grad, 1 - MUON_MOMENTUM)
        direction = grad.lerp(momentum, MUON_MOMENTUM)
        rows, columns = direction.shape[-2:]
        halves = 2 if direction.ndim == 3 and rows < columns else 1  # gate_up_proj holds two matrices per expert
        stacked = direction.reshape(-1, rows // halves, columns)
        update = orthogonalised(stacked).reshape(direction.shape)
        scale = max(1.0, rows / halves / columns) ** 0.5
        parameter.mul_(1 - rate * MUON_DECAY).add_(update, alpha=-rate * scale)


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimiser for the matrices and one for embeddings, head, norms and router gates."""
    matrices: list[nn.Parameter] = []
    others: dict[str, list[nn.Parameter]] = {name: [] for name in ADAM_RATES}
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in ADAM_RATES if kind in name), None)
        (matrices if kind is None else others[kind]).append(parameter)
    groups = [{"params": params, "lr": ADAM_RATES[kind]} for kind, params in others.items()]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.01, fused=True)
    optimizers: list[torch.optim.Optimizer] = [Muon(matrices), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
