"""The embedded toy model."""
