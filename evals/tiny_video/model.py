"""The old name of `vtprune.evals.toys.video.model`."""

from vtprune.evals.toys.video.model import ANSWER as ANSWER
from vtprune.evals.toys.video.model import BOS as BOS
from vtprune.evals.toys.video.model import EOS as EOS
from vtprune.evals.toys.video.model import IMAGE as IMAGE
from vtprune.evals.toys.video.model import MEAN_RGB as MEAN_RGB
from vtprune.evals.toys.video.model import PAD as PAD
from vtprune.evals.toys.video.model import POSITIONS as POSITIONS
from vtprune.evals.toys.video.model import SPECIALS as SPECIALS
from vtprune.evals.toys.video.model import STD as STD
from vtprune.evals.toys.video.model import TOWER as TOWER
from vtprune.evals.toys.video.model import UNK as UNK
from vtprune.evals.toys.video.model import VIDEO as VIDEO
from vtprune.evals.toys.video.model import VISION_END as VISION_END
from vtprune.evals.toys.video.model import VISION_START as VISION_START
from vtprune.evals.toys.video.model import VISUAL_TOKENS as VISUAL_TOKENS
from vtprune.evals.toys.video.model import VOCABULARY as VOCABULARY
from vtprune.evals.toys.video.model import WIDTH as WIDTH
from vtprune.evals.toys.video.model import build_config as build_config
from vtprune.evals.toys.video.model import build_model as build_model
from vtprune.evals.toys.video.model import build_processor as build_processor
from vtprune.evals.toys.video.model import save as save
