"""The old import path of `vtprune.methods.shared.scenes`."""

from .shared.scenes import Plan as Plan
from .shared.scenes import Variant as Variant
from .shared.scenes import cut_at as cut_at
from .shared.scenes import filled as filled
from .shared.scenes import refined as refined
from .shared.scenes import shared_out as shared_out
