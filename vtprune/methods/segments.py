"""The old import path of `vtprune.methods.shared.segments` and `.still`."""

from .shared.segments import Segment as Segment
from .shared.segments import cut as cut
from .shared.segments import run_lengths as run_lengths
from .shared.segments import still_places as still_places
from .shared.still import Folded as Folded
from .shared.still import Split as Split
