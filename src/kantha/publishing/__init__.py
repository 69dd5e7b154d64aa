"""From a checkpoint to a model that anyone can use."""

from kantha.publishing.card import Contributor, NamePoll, TrainingFacts
from kantha.publishing.export import export_model, find_checkpoint
from kantha.publishing.picture import HeldoutLoss, RoundLoss
from kantha.publishing.scores import Score, load_scores
from kantha.publishing.upload import check_publishing, upload_model

__all__ = [
    "Contributor",
    "HeldoutLoss",
    "NamePoll",
    "RoundLoss",
    "Score",
    "TrainingFacts",
    "check_publishing",
    "export_model",
    "find_checkpoint",
    "load_scores",
    "upload_model",
]
