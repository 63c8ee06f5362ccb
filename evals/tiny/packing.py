"""The old name of `vtprune.evals.toys.image.packing`."""

from vtprune.evals.toys.image.packing import normalise as normalise
from vtprune.evals.toys.image.packing import pack as pack
from vtprune.evals.toys.packing import lay as lay
