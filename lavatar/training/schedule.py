"""The learning rate over time: a factor of each group's peak rate."""

from __future__ import annotations

import math

from lavatar.configs.training import TrainingConfig


def rate_factor(step: int, config: TrainingConfig) -> float:
    """Factor in [0, 1] at `step` (0 is the first): linear warm-up, then constant or half a cosine to `final_rate`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
