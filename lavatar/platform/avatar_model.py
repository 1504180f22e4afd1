"""MLflow model from code: a released avatar. Pictures of the same person in (uint8 RGB: whole frames of a video,
N,H,W,3, or face crops), portraits out (N,H,W,3 uint8).

MLflow keeps a copy of this file beside the release (safetensors and JSON) and runs it when the model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel


class AvatarModel(PythonModel):
    """Driven by the avatar's own face: Eq. 2, then Eq. 3. Face crops are drawn in the mean training pose, frames of a
    video with the head's motion."""

    def load_context(self, context: Any) -> None:
        from lavatar.inference.loading import load_avatar

        self._about = context.artifacts.get("about")
        self._avatar = load_avatar(Path(context.artifacts["avatar"]))

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        from lavatar.inference.reenact import self_codes
        from lavatar.platform.portraits import portraits

        return portraits(self._avatar, lambda faces: self_codes(self._avatar, faces), model_input, self._about)


mlflow.models.set_model(AvatarModel())
