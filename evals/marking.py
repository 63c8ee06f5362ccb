"""The old name of `vtprune.evals.accuracy.marking`."""

from vtprune.evals.accuracy.marking import ARTICLES as ARTICLES
from vtprune.evals.accuracy.marking import CONTRACTIONS as CONTRACTIONS
from vtprune.evals.accuracy.marking import DIGITS as DIGITS
from vtprune.evals.accuracy.marking import mark as mark
from vtprune.evals.accuracy.marking import words as words
