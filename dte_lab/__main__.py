"""`python -m dte_lab`, and `accelerate launch -m dte_lab pretrain`: the `dte` command."""

from dte_lab.cli import main

if __name__ == "__main__":  # not in the processes that a worker pool spawns
    main()
