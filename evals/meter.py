"""The old name of `vtprune.evals.speed.meter`."""

from vtprune.evals.speed.meter import Allocated as Allocated
from vtprune.evals.speed.meter import Phases as Phases
from vtprune.evals.speed.meter import now as now
from vtprune.evals.speed.meter import seconds as seconds
