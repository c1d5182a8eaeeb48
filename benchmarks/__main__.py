"""All benchmarks, or some: each contender beside its peer, in turns, in one run.

python -m benchmarks                        all, results written to benchmarks/results/
python -m benchmarks lora sft               these
python -m benchmarks --quick --no-write     do they run?
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings

NAMES = ("start", "generation", "sft", "lora", "full", "grpo", "merge")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)}; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="counted rounds of each; default: its own number")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that they run")
    parser.add_argument("--no-write", dest="write", action="store_false", help="print only")
    a = parser.parse_args()
    if unknown := set(a.names) - set(NAMES):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    warnings.simplefilter("ignore")

    from benchmarks.side import Options, table, write

    options = Options(a.threads, a.rounds, a.quick, a.write)
    for name in a.names or NAMES:
        if name != "start":
            import torch

            torch.set_num_threads(a.threads)
        began = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        made = write(importlib.import_module(f"benchmarks.{name}").run(options), options)
        print(f"{name} took {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        print(table([made]), flush=True)


if __name__ == "__main__":
    main()
