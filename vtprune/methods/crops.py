"""The old import path of `vtprune.methods.shared.crops`."""

from .shared.crops import crops as crops
