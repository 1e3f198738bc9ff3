"""AdamW that can be held, so that a test finds a training where it wants it. A job names it as `held_optimizer.HeldAdamW`."""

import time
from pathlib import Path

import torch


class HeldAdamW(torch.optim.AdamW):
    """Does not begin its step number `at` (from 1, of this process) while the file `hold` exists."""

    def __init__(self, params, lr, weight_decay, hold, at):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.hold, self.at, self.count = Path(hold), at, 0

    def step(self):
        self.count += 1
        while self.count == self.at and self.hold.exists():
            time.sleep(0.02)
        return super().step()
