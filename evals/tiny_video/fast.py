"""The old name of `vtprune.evals.toys.video.fast`."""

from vtprune.evals.toys.video.fast import CELLS as CELLS
from vtprune.evals.toys.video.fast import PREFIX as PREFIX
from vtprune.evals.toys.video.fast import patches as patches
from vtprune.evals.toys.video.fast import question_hidden as question_hidden
from vtprune.evals.toys.video.fast import visual_tokens as visual_tokens
