"""How soon the command says something: `temper --help`, and `import temperament`, as whole processes beside the bare
interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial

from benchmarks.side import Options, Result, interleave

LOADED = "import sys, temperament; sys.exit(1 if 'torch' in sys.modules else 0)"


def run(options: Options) -> Result:
    result = Result("start", "Start", "Whole processes, one after the other.", "ms")
    commands = {
        "interpreter": [sys.executable, "-c", "pass"],
        "import temperament": [sys.executable, "-c", "import temperament"],
        "temper --help": [sys.executable, "-m", "temperament.cli", "--help"],
    }
    quiet = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    laps = interleave({name: lambda c=command: quiet(c) and None for name, command in commands.items()}, options.turns(11))
    for of in laps.values():  # the work is in the child: its CPU time is not this process'
        of[:] = [type(lap)(lap.wall, 0.0) for lap in of]
    result.add("", laps)
    result.promise("temper --help, seconds", statistics.median(x.wall for x in laps["temper --help"]), at_most=0.3)
    result.promise("import temperament loads torch", subprocess.run([sys.executable, "-c", LOADED]).returncode, at_most=0)
    return result
