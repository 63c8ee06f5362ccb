"""The old name of `vtprune.evals.toys.image.scenes`."""

from vtprune.evals.toys.image.scenes import COLOR_NAMES as COLOR_NAMES
from vtprune.evals.toys.image.scenes import COLORS as COLORS
from vtprune.evals.toys.image.scenes import DIGIT_OWNER as DIGIT_OWNER
from vtprune.evals.toys.image.scenes import GRID as GRID
from vtprune.evals.toys.image.scenes import MAX_COUNT as MAX_COUNT
from vtprune.evals.toys.image.scenes import PATCH as PATCH
from vtprune.evals.toys.image.scenes import SHAPES as SHAPES
from vtprune.evals.toys.image.scenes import SIDE as SIDE
from vtprune.evals.toys.image.scenes import Item as Item
from vtprune.evals.toys.image.scenes import Scene as Scene
from vtprune.evals.toys.image.scenes import heldout_rng as heldout_rng
from vtprune.evals.toys.image.scenes import make_scene as make_scene
from vtprune.evals.toys.image.scenes import place_words as place_words
from vtprune.evals.toys.image.scenes import silhouette as silhouette
from vtprune.evals.toys.image.scenes import stencil as stencil
from vtprune.evals.toys.image.scenes import training_rng as training_rng
from vtprune.evals.toys.image.scenes import words_for as words_for
