"""How good is the model? Held-out loss, and what it fills in."""

from kantha.evaluation.heldout import (
    FilledMask,
    HeldoutScores,
    fill_blanks,
    fill_masks,
    heldout_loss,
    measure_heldout,
    quiet_transformers,
    word_pieces,
)

__all__ = [
    "FilledMask",
    "HeldoutScores",
    "fill_blanks",
    "fill_masks",
    "heldout_loss",
    "measure_heldout",
    "quiet_transformers",
    "word_pieces",
]
