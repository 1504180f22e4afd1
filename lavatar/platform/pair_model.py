"""MLflow model from code: an avatar driven by one actor. Pictures of the actor in (uint8 RGB: whole frames of a video,
N,H,W,3, or face crops), portraits of the avatar out (N,H,W,3 uint8).

MLflow keeps a copy of this file beside both releases (safetensors and JSON) and runs it when the model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel


class PairModel(PythonModel):
    """Driven by the actor's face: E_shared, the mapping MLP, then Eq. 3. Face crops are drawn in the avatar's mean
    training pose, frames of a video with the head's motion."""

    def load_context(self, context: Any) -> None:
        from lavatar.inference.loading import load_avatar, load_pair

        self._about = context.artifacts.get("about")
        self._avatar = load_avatar(Path(context.artifacts["avatar"]))
        self._pair = load_pair(Path(context.artifacts["pair"]))

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        from lavatar.inference.reenact import cross_codes
        from lavatar.platform.portraits import portraits

        return portraits(self._avatar, lambda faces: cross_codes(self._pair, faces), model_input, self._about)


mlflow.models.set_model(PairModel())
