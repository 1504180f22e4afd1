"""A training that goes on with another one's weights: population based training copies the better trial.

The two may differ in the sizes of their models. What has the same name and shape on both sides is taken, weights with
their moments; the rest stays as it begins. The step is the other one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lavatar.training import checkpoint as checkpoints
from lavatar.training.checkpoint import Checkpoint
from lavatar.training.engine import Engine, EngineState
from lavatar.training.tasks import TrainingTask


def fitted(own: EngineState, theirs: EngineState) -> EngineState:
    """Their state as far as it fits, else one's own. A parameter's moments go with the parameter."""
    shared = {name for name, value in own.modules.items() if _fits(theirs.modules.get(name), value)}
    modules = {name: theirs.modules[name] if name in shared else value for name, value in own.modules.items()}
    moments = {
        key: theirs.moments[key] if key.partition("/")[2] in shared and key in theirs.moments else value
        for key, value in own.moments.items()
    }
    return EngineState(modules, moments)


def fitted_tensors(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Theirs where name and shape are the same, else one's own."""
    return {name: theirs[name] if _fits(theirs.get(name), value) else value for name, value in own.items()}


def _fits(theirs: Tensor | None, own: Tensor) -> bool:
    return theirs is not None and theirs.shape == own.shape


def transplant(donor: Path, folder: Path, task: TrainingTask, engine: Engine) -> Path:
    """Write the checkpoint `donor` of another training into `folder` as one of this task's own.

    Random numbers are drawn anew from seed and step, and everything that the configuration says is this task's.
    """
    theirs = checkpoints.load(donor)
    state = fitted(engine.export_state(), EngineState(dict(theirs.modules), dict(theirs.optimizer)))
    extra = {name: value.detach().cpu().contiguous() for name, value in task.state().items()}
    own = Checkpoint(theirs.step, state.modules, state.moments, {}, fitted_tensors(extra, theirs.task), {})
    return checkpoints.save(folder, own)
