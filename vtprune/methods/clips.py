"""The old import path of `vtprune.methods.shared.clips` and `.frames`."""

from .shared.clips import Clip as Clip
from .shared.clips import Reduce as Reduce
from .shared.clips import by_clip as by_clip
from .shared.clips import check_ratio as check_ratio
from .shared.clips import clips as clips
from .shared.frames import evenly_shared as evenly_shared
from .shared.frames import flow as flow
from .shared.frames import likeness as likeness
from .shared.frames import places as places
from .shared.frames import ranks_in_rows as ranks_in_rows
