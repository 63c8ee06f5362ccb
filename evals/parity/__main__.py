import sys

from vtprune.evals.parity.runner import main

if __name__ == "__main__":
    sys.exit(main())
