"""`python -m temperament` is `temper`."""

from temperament.cli import main

main()
