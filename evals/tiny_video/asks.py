"""The old name of `vtprune.evals.toys.video.asks`."""

from vtprune.evals.toys.video.asks import ASKERS as ASKERS
from vtprune.evals.toys.video.asks import ask_count as ask_count
from vtprune.evals.toys.video.asks import ask_direction as ask_direction
from vtprune.evals.toys.video.asks import ask_first as ask_first
from vtprune.evals.toys.video.asks import ask_order as ask_order
from vtprune.evals.toys.video.asks import ask_shape as ask_shape
from vtprune.evals.toys.video.asks import captions as captions
from vtprune.evals.toys.video.asks import training_asks as training_asks
