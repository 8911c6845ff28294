"""`python -m embedwright`: the command, for starters of many processes (`torchrun -m embedwright train RECIPE`)."""

from embedwright.cli.main import main

main()
