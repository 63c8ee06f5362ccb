"""The old name of `vtprune.evals.accuracy.vit_search`."""

from vtprune.evals.accuracy.vit_search import SHARES as SHARES
from vtprune.evals.accuracy.vit_search import Found as Found
from vtprune.evals.accuracy.vit_search import search as search
