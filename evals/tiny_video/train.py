"""The old name of `vtprune.evals.toys.video.train`."""

from vtprune.evals.toys.video.train import STAGES as STAGES
from vtprune.evals.toys.video.train import TOWER_SLOTS as TOWER_SLOTS
from vtprune.evals.toys.video.train import Stage as Stage
from vtprune.evals.toys.video.train import VideoTrainer as VideoTrainer
from vtprune.evals.toys.video.train import main as main
from vtprune.evals.toys.video.train import train as train

if __name__ == "__main__":
    main()
