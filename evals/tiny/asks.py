"""The old name of `vtprune.evals.toys.image.asks`."""

from vtprune.evals.toys.asks import Ask as Ask
from vtprune.evals.toys.image.asks import ASKERS as ASKERS
from vtprune.evals.toys.image.asks import RELATIONS as RELATIONS
from vtprune.evals.toys.image.asks import ask_color as ask_color
from vtprune.evals.toys.image.asks import ask_count as ask_count
from vtprune.evals.toys.image.asks import ask_count_kind as ask_count_kind
from vtprune.evals.toys.image.asks import ask_exist as ask_exist
from vtprune.evals.toys.image.asks import ask_ocr as ask_ocr
from vtprune.evals.toys.image.asks import ask_position as ask_position
from vtprune.evals.toys.image.asks import ask_relation as ask_relation
from vtprune.evals.toys.image.asks import ask_shape as ask_shape
from vtprune.evals.toys.image.asks import captions as captions
from vtprune.evals.toys.image.asks import coordinates as coordinates
from vtprune.evals.toys.image.asks import easy_ask as easy_ask
from vtprune.evals.toys.image.asks import references as references
from vtprune.evals.toys.image.asks import training_asks as training_asks
