"""The old name of `vtprune.evals.toys.video`."""

from vtprune.evals.toys.video import CAPABILITIES as CAPABILITIES
from vtprune.evals.toys.video import CHECKPOINT as CHECKPOINT
from vtprune.evals.toys.video import Question as Question
from vtprune.evals.toys.video import as_video as as_video
from vtprune.evals.toys.video import blind as blind
from vtprune.evals.toys.video import load as load
from vtprune.evals.toys.video import questions as questions
