"""The old name of `vtprune.evals.toys.image.fast`."""

from vtprune.evals.toys.image.fast import PREFIX as PREFIX
from vtprune.evals.toys.image.fast import project as project
from vtprune.evals.toys.image.fast import question_hidden as question_hidden
from vtprune.evals.toys.image.fast import tower_features as tower_features
