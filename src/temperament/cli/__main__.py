"""`python -m temperament.cli`: the same as `temper`, for launchers (accelerate launch -m temperament.cli tune ...)."""

import sys

from temperament.cli import main

sys.exit(main())
