"""The coordinator: the web service at which a run's people and machines meet."""
