"""The old name of `vtprune.evals.toys.image.train`."""

from vtprune.evals.toys.image.train import STAGES as STAGES
from vtprune.evals.toys.image.train import EasyTrain as EasyTrain
from vtprune.evals.toys.image.train import Stage as Stage
from vtprune.evals.toys.image.train import Trainer as Trainer
from vtprune.evals.toys.image.train import main as main
from vtprune.evals.toys.image.train import train as train

if __name__ == "__main__":
    main()
