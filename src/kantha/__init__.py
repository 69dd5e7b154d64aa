"""Kantha: a community trains a language model together, on everybody's spare compute."""

__version__ = "0.1.0"
