"""The old name of `vtprune.evals.toys.video.clips`."""

from vtprune.evals.toys.image.scenes import COLORS as COLORS
from vtprune.evals.toys.video.clips import COLOR_NAMES as COLOR_NAMES
from vtprune.evals.toys.video.clips import FPS as FPS
from vtprune.evals.toys.video.clips import FRAMES as FRAMES
from vtprune.evals.toys.video.clips import GRID as GRID
from vtprune.evals.toys.video.clips import MAX_EVENTS as MAX_EVENTS
from vtprune.evals.toys.video.clips import MERGE as MERGE
from vtprune.evals.toys.video.clips import PATCH as PATCH
from vtprune.evals.toys.video.clips import SIDE as SIDE
from vtprune.evals.toys.video.clips import SLOT as SLOT
from vtprune.evals.toys.video.clips import SLOTS as SLOTS
from vtprune.evals.toys.video.clips import WAYS as WAYS
from vtprune.evals.toys.video.clips import Clip as Clip
from vtprune.evals.toys.video.clips import Event as Event
from vtprune.evals.toys.video.clips import heldout_rng as heldout_rng
from vtprune.evals.toys.video.clips import make_clip as make_clip
from vtprune.evals.toys.video.clips import training_rng as training_rng
