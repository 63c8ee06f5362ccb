"""The old name of `vtprune.evals.accuracy.vit_data`."""

from vtprune.evals.accuracy.vit_data import DATA as DATA
from vtprune.evals.accuracy.vit_data import INSIDE as INSIDE
from vtprune.evals.accuracy.vit_data import MEAN as MEAN
from vtprune.evals.accuracy.vit_data import RENAMED as RENAMED
from vtprune.evals.accuracy.vit_data import STD as STD
from vtprune.evals.accuracy.vit_data import dinov2_small as dinov2_small
from vtprune.evals.accuracy.vit_data import fashion as fashion
from vtprune.evals.accuracy.vit_data import nearest as nearest
from vtprune.evals.accuracy.vit_data import photo as photo
from vtprune.evals.accuracy.vit_data import pixels as pixels
from vtprune.evals.accuracy.vit_data import probe as probe
