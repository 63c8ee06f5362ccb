"""Pruning methods, one file each; they know tensors and no models."""
