"""Joining a run: from its link to gradients that count."""
