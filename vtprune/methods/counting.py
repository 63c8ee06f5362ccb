"""The old import path of `vtprune.methods.shared.counting`."""

from .shared.counting import apportion as apportion
from .shared.counting import in_proportion as in_proportion
from .shared.counting import ranks as ranks
