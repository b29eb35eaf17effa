"""The command line as `python -m flexgs`."""

from flexgs.cli import main

main()
