"""The accuracy tables of all embedded models: `python -m vtprune.evals.accuracy --out benchmarks/DAY-accuracy`.

Writes DAY-accuracy-image, -video and -mid, each with eval.json, eval.md and pareto.png. A run that was stopped goes on
behind the last row that is in eval.json. A model that is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from vtprune.evals import models
from vtprune.evals.accuracy.table import every_method, keeps_of, table
from vtprune.evals.toys import TOYS, toy
from vtprune.parsing import parse_keep


def main(given: list[str] | None = None) -> None:
    """Make the tables that the arguments ask for, all of them without any."""
    parser = argparse.ArgumentParser(prog="python -m vtprune.evals.accuracy", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folders to write to, without the model's name")
    parser.add_argument("--models", nargs="+", choices=TOYS, default=list(TOYS))
    parser.add_argument("--method", nargs="+", help="all of them, unless some are named")
    parser.add_argument("--keep", nargs="+", type=lambda text: parse_keep(text), help="shares or counts")
    parser.add_argument("--limit", type=int, default=310, help="questions of a kind")
    parser.add_argument("--seed", type=int, help="other questions than those of the tables")
    parser.add_argument("--seeds", type=int, default=3, help="draws of a random method")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=16, help="questions that the cost of a row is measured on")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(given)
    models.quiet()
    for name in options.models:
        video = name == "video"
        try:
            asked = toy(name)
            model, processor = asked.load("cpu", getattr(torch, options.dtype))
        except (ImportError, OSError) as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
            continue
        drawn = {} if options.seed is None else {"seed": options.seed}
        out = options.out.with_name(f"{options.out.name}-{name}")
        table(
            model, processor, asked.questions(per_capability=options.limit, **drawn),
            options.method or every_method(video), options.keep or keeps_of(video), out,
            seeds=options.seeds, batch=options.batch, prompts=options.prompts, workers=options.workers, skip=True,
            title=f"Accuracy of {TOYS[name]}, {options.limit} questions a capability, percent",
        )  # fmt: skip
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
