"""python -m flexgs"""

from flexgs.cli import main

main()
