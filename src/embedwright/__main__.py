"""Runs the command as `python -m embedwright`, for launchers such as `torchrun -m embedwright train RECIPE`."""

from embedwright.cli.main import main

main()
