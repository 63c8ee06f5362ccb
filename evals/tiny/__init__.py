"""The old name of `vtprune.evals.toys.image`."""

from vtprune.evals.toys.image import CAPABILITIES as CAPABILITIES
from vtprune.evals.toys.image import CHECKPOINT as CHECKPOINT
from vtprune.evals.toys.image import EASY_LIMIT as EASY_LIMIT
from vtprune.evals.toys.image import FOLDER as FOLDER
from vtprune.evals.toys.image import Question as Question
from vtprune.evals.toys.image import Visible as Visible
from vtprune.evals.toys.image import blind as blind
from vtprune.evals.toys.image import load as load
from vtprune.evals.toys.image import questions as questions
