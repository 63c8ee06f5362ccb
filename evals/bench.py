"""The old name of `vtprune.evals.speed.bench`."""

from vtprune.evals.speed.bench import KEEPS as KEEPS
from vtprune.evals.speed.bench import METHODS as METHODS
from vtprune.evals.speed.bench import PIXELS as PIXELS
from vtprune.evals.speed.bench import Floors as Floors
from vtprune.evals.speed.bench import Subject as Subject
from vtprune.evals.speed.bench import bench as bench
from vtprune.evals.speed.bench import from_processor as from_processor
from vtprune.evals.speed.bench import subject as subject
