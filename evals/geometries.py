"""The old name of `vtprune.evals.speed.geometries`."""

from vtprune.evals.speed.geometries import GEOMETRIES as GEOMETRIES
from vtprune.evals.speed.geometries import TEXT_TOKENS as TEXT_TOKENS
from vtprune.evals.speed.geometries import Geometry as Geometry
from vtprune.evals.speed.geometries import build as build
from vtprune.evals.speed.geometries import encode as encode
from vtprune.evals.speed.geometries import prompt as prompt
from vtprune.evals.speed.geometries import visual_tokens as visual_tokens
