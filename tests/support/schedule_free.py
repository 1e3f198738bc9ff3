"""Schedule-free optimizers (Defazio et al. 2024) as the package schedulefree has them.

A job names them as `schedule_free.SGD` and `schedule_free.AdamW`. In training the parameters are y, where gradients are
computed; `eval` makes them x, the weighted average that is evaluated and exported, `train` makes them y again:
y = (1 - beta) z + beta x.
"""

import torch


class _ScheduleFree(torch.optim.Optimizer):
    def __init__(self, params, *, lr, weight_decay, betas, **more):
        numbers = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "train_mode": False}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, **more, **numbers})

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            if group["train_mode"]:
                self._move(group, 1 - 1 / group["betas"][0])
                group["train_mode"] = False

    @torch.no_grad()
    def train(self):
        for group in self.param_groups:
            if not group["train_mode"]:
                self._move(group, 1 - group["betas"][0])
                group["train_mode"] = True

    def _move(self, group, weight):
        for param in group["params"]:
            if "z" in self.state[param]:
                param.lerp_(end=self.state[param]["z"], weight=weight)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            if not group["train_mode"]:
                raise Exception("Optimizer was not in train mode when step is called")
            lr, beta = group["lr"], group["betas"][0]
            group["k"] += 1
            group["lr_max"] = max(lr, group["lr_max"])
            weight = group["lr_max"] ** 2
            group["weight_sum"] += weight
            share = weight / group["weight_sum"] if group["weight_sum"] else 0.0
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "z" not in state:
                    state["z"] = param.clone()
                direction = self._direction(group, state, param.grad).add(param, alpha=group["weight_decay"])
                param.lerp_(end=state["z"], weight=share)
                param.add_(direction, alpha=lr * (beta * (1 - share) - 1))
                state["z"].sub_(direction, alpha=lr)


class SGD(_ScheduleFree):
    """Schedule-free gradient descent."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9):
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=(momentum, 0.0))

    def _direction(self, group, state, gradient):
        return gradient.clone()


class AdamW(_ScheduleFree):
    """Schedule-free AdamW."""

    def __init__(self, params, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=tuple(betas), eps=eps)

    def _direction(self, group, state, gradient):
        beta = group["betas"][1]
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["exp_avg_sq"].mul_(beta).addcmul_(gradient, gradient, value=1 - beta)
        return gradient / (state["exp_avg_sq"] / (1 - beta ** group["k"])).sqrt().add_(group["eps"])
