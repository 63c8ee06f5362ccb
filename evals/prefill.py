"""The old name of `vtprune.evals.speed.prefill`."""

from vtprune.evals.speed.prefill import KNOWN as KNOWN
from vtprune.evals.speed.prefill import MODES as MODES
from vtprune.evals.speed.prefill import Bucketed as Bucketed
from vtprune.evals.speed.prefill import Graph as Graph
