"""The old import path of `vtprune.methods.shared.text`."""

from .shared.text import note as note
from .shared.text import prompt_similarity as prompt_similarity
