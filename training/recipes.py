"""How sparse training goes, as data: when masks change, which decay, when they freeze."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One way to train with masks.

    Attributes:
        name: what a config says.
        refresh_every: optimizer steps between mask updates; None: the first mask stays.
        decay: strength of the pull of pruned weights to zero: decay * w joins their gradient after clipping.
        freeze_at: fraction of the steps after which masks no longer change.
        lr_scale: learning rate as a multiple of the dense one.
    """

    name: str
    refresh_every: int | None = None
    decay: float = 0.0
    freeze_at: float = 1.0
    lr_scale: float = 1.0

    def refreshes(self, step: int, total_steps: int | None) -> bool:
        """Whether masks are recomputed after optimizer step `step` (1 = the first).

        Args:
            step: optimizer steps done.
            total_steps: of the whole training; None: never freeze.
        """
        if self.refresh_every is None or step % self.refresh_every:
            return False
        return total_steps is None or step < self.freeze_at * total_steps


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # Hubara et al. 2021, section 3.2: mask a pretrained network once, retrain the weights left.
        Recipe("static"),
        # Section 3.3 with the decay of Hu et al. 2024 and a larger rate: see docs/decisions for the measurements.
        Recipe("dynamic", refresh_every=40, decay=5e-3, freeze_at=0.65, lr_scale=2.0),
    )
}


def recipe_named(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        ValueError: no such recipe; the message lists them.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
