"""The web: what the coordinator answers over HTTP, its pages for people and its API for machines."""
