"""Sec. 5.2: the baselines, each as what it changes in a recipe.

Nothing is imported that takes long: the command line names them in its help.
"""

from __future__ import annotations

from collections.abc import Mapping

from lavatar.contracts import COEFFICIENTS

COEFFICIENT_DRIVEN = ("avatar.encoder=coefficients", f"avatar.code_dim={COEFFICIENTS}", "avatar.input_noise=0")
NERFACE = (
    *COEFFICIENT_DRIVEN, "avatar.field=mlp", "avatar.superresolution=residual",
    "avatar.density_activation=relu", "avatar.density_bias=0.2", "avatar.density_noise=0.1", "avatar.samples=64",
    "avatar_training.learning_rate=5.0e-4", "avatar_training.batch_size=1",
)  # fmt: skip

BASELINES: Mapping[str, tuple[str, ...]] = {
    "latentavatar": (),
    "no-cycle": ("ynet_loss.image_cycle=false", "ynet_loss.lambda_code=[0, 0]"),  # Sec. 5.2.3: Eq. 7 is L_rec alone
    "coeff-triplane": COEFFICIENT_DRIVEN,
    "nerface": NERFACE,
}
PAIRED = ("latentavatar", "no-cycle")
"""These cross by a Y-network and a mapping; the others are driven by the actor's own coefficients."""
