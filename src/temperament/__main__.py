"""`python -m temperament` is `temper`."""

import sys

from temperament.cli import main

sys.exit(main())
