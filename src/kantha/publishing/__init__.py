"""From a checkpoint to a model that anyone can use."""

from kantha.publishing.export import export_model

__all__ = ["export_model"]
