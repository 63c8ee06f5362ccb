"""vLLM's worker on a CPU, whose runner does not ask by itself whether rows carry their positions along (seen: 0.32)."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class PrunedCPUWorker(CPUWorker):
    """`CPUWorker` for a pruned model."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and let the runner take positions off the features."""
        super().load_model(*args, **kwargs)
        self.model_runner.is_multimodal_pruning_enabled = True
