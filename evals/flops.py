"""The old name of `vtprune.evals.speed.flops`."""

from vtprune.evals.speed.flops import CARDS as CARDS
from vtprune.evals.speed.flops import FORMULA as FORMULA
from vtprune.evals.speed.flops import Card as Card
from vtprune.evals.speed.flops import TextCost as TextCost
from vtprune.evals.speed.flops import card as card
from vtprune.evals.speed.flops import counted as counted
from vtprune.evals.speed.flops import ideal_llm as ideal_llm
from vtprune.evals.speed.flops import measured as measured
from vtprune.evals.speed.flops import peak as peak
