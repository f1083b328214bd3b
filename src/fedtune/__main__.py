"""`python -m fedtune`."""

from fedtune.cli import main

main()
