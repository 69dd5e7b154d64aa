"""How good is the model? Held-out loss, and what it fills in."""

from kantha.evaluation.heldout import FilledMask, fill_masks, heldout_loss, quiet_transformers

__all__ = ["FilledMask", "fill_masks", "heldout_loss", "quiet_transformers"]
