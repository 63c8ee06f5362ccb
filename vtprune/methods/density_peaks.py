"""The old import path of `vtprune.methods.shared.density_peaks`."""

from .shared.density_peaks import centres as centres
from .shared.density_peaks import cluster_weights as cluster_weights
from .shared.density_peaks import clusters as clusters
from .shared.density_peaks import density_peaks as density_peaks
from .shared.density_peaks import peaks as peaks
from .shared.recycling import recycle as recycle
