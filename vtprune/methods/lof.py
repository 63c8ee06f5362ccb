"""The old import path of `vtprune.methods.shared.lof`."""

from .shared.lof import outliers as outliers
