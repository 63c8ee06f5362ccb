"""The old import path of `vtprune.methods.shared.raster`."""

from .shared.raster import Mode as Mode
from .shared.raster import blocks as blocks
from .shared.raster import evenly as evenly
from .shared.raster import resample as resample
from .shared.raster import views as views
