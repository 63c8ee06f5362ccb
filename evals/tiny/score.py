"""The old name of `vtprune.evals.toys.image.score`."""

from vtprune.evals.toys.image.score import Score as Score
from vtprune.evals.toys.image.score import main as main
from vtprune.evals.toys.image.score import score as score

if __name__ == "__main__":
    main()
