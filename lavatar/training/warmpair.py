"""A Y-network that begins where another pair of the same avatar ended (docs/adr/0003).

What belongs to the avatar or to everybody is taken over: E_shared with the statistics that whiten it, the shared neck,
the landmark read-out, the avatar's decoder. The actor's decoder begins new, and so does the mapping MLP, which is
fitted to the new γ in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lavatar.configs.pair import YNetConfig
from lavatar.errors import CheckpointError
from lavatar.models.ynet import YNetwork
from lavatar.training.errorcurve import ErrorCurve

NEW = "decoders.actor."


@dataclass(frozen=True)
class ColdErrors:
    """The errors of a training that began cold, and whose it was."""

    pair: str
    curve: ErrorCurve


@dataclass(frozen=True)
class WarmPair:
    """The trained pair that another one begins at."""

    name: str  # "conversation<-grimaces"
    config: YNetConfig
    state: Mapping[str, Tensor]  # of its Y-network
    cold: ColdErrors | None  # its own if it began cold, else those it was compared with


def begin_warm(ynet: YNetwork, warm: WarmPair) -> None:
    """Everything but the actor's decoder from `warm`. Raises CheckpointError for another architecture."""
    if warm.config != ynet.config:
        raise CheckpointError(
            f"{warm.name} has another Y-network than this pair, which was to begin at it",
            "Submit again with --cold.",
        )
    kept = {name: value for name, value in warm.state.items() if not name.startswith(NEW)}
    missing, unexpected = ynet.load_state_dict(kept, strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.startswith(NEW))]
    if wrong:
        raise CheckpointError(f"{warm.name} does not fit this lavatar: {', '.join(wrong[:3])}", "Submit with --cold.")
