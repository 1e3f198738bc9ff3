"""On which nodes an elastic run counts.

Ray Train asks a service whose view is seconds old, and which counts nodes that will be taken away: it then waits in vain for
workers there, as long as such a node lives. There is no public way to tell it, so that two of its internal classes are
extended here.
"""

from __future__ import annotations

from typing import Any

from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from diffsynth_ray.data.nodes import staying_nodes


class ElasticTrainer(TorchTrainer):
    """A TorchTrainer whose elastic runs start workers on nodes that stay."""

    def _initialize_and_run_controller(self, **given: Any) -> Result:
        if self.scaling_config.elasticity_enabled:
            given["scaling_policy"] = StayingNodesPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**given)


class StayingNodesPolicy(ElasticScalingPolicy):
    """Lives in Ray Train's controller; counts neither dead nodes nor those that are being drained."""

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        staying = staying_nodes()
        return super()._count_possible_workers({node: has for node, has in reserved_resources.items() if node in staying})
