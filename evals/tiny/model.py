"""The old name of `vtprune.evals.toys.image.model`."""

from vtprune.evals.toys.image.model import ANSWER as ANSWER
from vtprune.evals.toys.image.model import BOS as BOS
from vtprune.evals.toys.image.model import EOS as EOS
from vtprune.evals.toys.image.model import IMAGE as IMAGE
from vtprune.evals.toys.image.model import MEAN_RGB as MEAN_RGB
from vtprune.evals.toys.image.model import PAD as PAD
from vtprune.evals.toys.image.model import POSITIONS as POSITIONS
from vtprune.evals.toys.image.model import SPECIALS as SPECIALS
from vtprune.evals.toys.image.model import STD as STD
from vtprune.evals.toys.image.model import UNK as UNK
from vtprune.evals.toys.image.model import VISUAL_TOKENS as VISUAL_TOKENS
from vtprune.evals.toys.image.model import VOCABULARY as VOCABULARY
from vtprune.evals.toys.image.model import WORDS as WORDS
from vtprune.evals.toys.image.model import build_config as build_config
from vtprune.evals.toys.image.model import build_model as build_model
from vtprune.evals.toys.image.model import build_processor as build_processor
from vtprune.evals.toys.image.model import save as save
from vtprune.evals.toys.image.model import tower as tower
