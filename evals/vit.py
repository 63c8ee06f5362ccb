"""The old name of `vtprune.evals.accuracy.vit`."""

from vtprune.evals.accuracy.vit import KEEPS as KEEPS
from vtprune.evals.accuracy.vit import LOSS as LOSS
from vtprune.evals.accuracy.vit import METHODS as METHODS
from vtprune.evals.accuracy.vit import NOTES as NOTES
from vtprune.evals.accuracy.vit import VitReport as VitReport
from vtprune.evals.accuracy.vit import evaluate as evaluate
