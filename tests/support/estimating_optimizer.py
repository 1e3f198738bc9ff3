"""An optimizer that estimates its own step size, as Prodigy and D-Adaptation do: numbers of the whole group steer its updates.

A job names it as `estimating_optimizer.Estimating`.
"""

import torch


class Estimating(torch.optim.Optimizer):
    """Gradient descent whose step is `lr` times an estimated distance: a number of the group, like its count of steps."""

    def __init__(self, params, lr, weight_decay, growth=0.5):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "growth": growth, "distance": 0.25, "count": 0})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        group["count"] += 1
        agreement, square = 0.0, 1e-12
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state |= {"moved": torch.zeros_like(param), "updates": 0}
            agreement += torch.dot(param.grad.flatten(), state["moved"].flatten()).abs().item()
            square += param.grad.norm().item() * state["moved"].norm().item()
        group["distance"] = max(group["distance"], 0.25 + group["growth"] * agreement / square * group["count"])
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            state["updates"] += 1
            factor = group["lr"] * group["distance"] * (1 - 0.9 ** state["updates"])
            param.mul_(1 - factor * group["weight_decay"]).sub_(param.grad, alpha=factor)
            state["moved"].add_(param.grad, alpha=factor)


class Sliced(torch.optim.SGD):
    """Remembers every other weight only, as Prodigy does with `slice_p`."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        super().step()
        for param in self.param_groups[0]["params"]:
            self.state[param]["sliced"] = param.flatten()[::2].clone()
