"""Merging beside mergekit in one run: TIES, DARE-TIES and linear of three sharded fp32 models and a base; seconds and peak
memory.

    python -m benchmarks merge [--quick] [--rounds 3] [--threads N]

Each merge runs in a process of its own, from files in the page cache to files; start-up (imports) is not counted. mergekit is
installed in an environment of its own where no Python has it (`benchmarks/mergekit.py`). Peak memory is also taken at 8 times
the size, where ours must not grow.
"""

import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import mergekit
from benchmarks.side import Lap, Options, Result, ratio

METHODS = {
    "linear": {"merge_method": "linear"},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.2}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.5}},
}
SHARD = 200_000_000


def shapes(millions: float) -> dict[str, tuple[int, ...]]:
    """A Llama of about this many parameters, width 1024, vocabulary 32,000 (small ones 2,000), tied."""
    words = 32_000 if millions > 100 else 2_000
    found = {"model.embed_tokens.weight": (words, 1024), "model.norm.weight": (1024,)}
    layer = {"self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (1024, 1024), "self_attn.v_proj": (1024, 1024),
             "self_attn.o_proj": (1024, 1024), "mlp.gate_proj": (3328, 1024), "mlp.up_proj": (3328, 1024),
             "mlp.down_proj": (1024, 3328), "input_layernorm": (1024,), "post_attention_layernorm": (1024,)}  # fmt: skip
    each = sum(map(math.prod, layer.values()))
    for i in range(max(1, round((millions * 1e6 - words * 1024) / each))):
        found |= {f"model.layers.{i}.{n}.weight": s for n, s in layer.items()}
    return found


def make(folder: Path, millions: float, models: int = 4) -> int:
    """Random checkpoints, tuned ones near the base; written tensor by tensor."""
    import torch

    from temperament.delta.tensorfile import Entry, Writer

    found = shapes(millions)
    layers = 1 + max(int(n.split(".")[2]) for n in found if n.startswith("model.layers"))
    for m in range(models):
        place = folder / f"m{m}"
        place.mkdir(parents=True)
        with Writer(place, {n: Entry(torch.float32, s) for n, s in found.items()}, shard_bytes=SHARD) as writer:
            for i, (name, shape) in enumerate(sorted(found.items())):
                tensor = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(i))
                if m:
                    tensor += 0.005 * torch.randn(shape, generator=torch.Generator().manual_seed(1000 * m + i))
                writer.write(name, tensor)
        words = found["model.embed_tokens.weight"][0]
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 3328,
                  "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": words,
                  "tie_word_embeddings": True, "torch_dtype": "float32"}  # fmt: skip
        (place / "config.json").write_text(json.dumps(config))
    return sum(map(math.prod, found.values()))


def config(folder: Path, method: str) -> Path:
    document = {"models": [{"model": str(folder / f"m{i}"), "parameters": {"weight": 0.3}} for i in (1, 2, 3)],
                "base_model": str(folder / "m0"), "dtype": "float32", **METHODS[method]}  # fmt: skip
    if method == "linear":
        del document["base_model"]
    import yaml

    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(document))
    return path


OURS = """
import sys, time
begin = time.perf_counter()
import torch
from temperament.run.merging import merge
loaded = time.perf_counter()
threads = int(sys.argv[3]) or None
merge(sys.argv[1], sys.argv[2], certificate=False, shard_bytes=200_000_000, threads=threads)
print(loaded - begin, time.perf_counter() - loaded)
"""
THEIRS = """
import sys, time
begin = time.perf_counter()
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
loaded = time.perf_counter()
with open(sys.argv[1]) as file:
    parsed = MergeConfiguration.model_validate(yaml.safe_load(file))
options = MergeOptions(copy_tokenizer=False, write_model_card=False, lazy_unpickle=True, out_shard_size=200_000_000)
run_merge(parsed, sys.argv[2], options=options)
print(loaded - begin, time.perf_counter() - loaded)
"""


# of this process alone: ru_maxrss would begin with what the parent held when it started us
PEAK = """
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def measure(python: str, code: str, path: Path, out: Path, threads: int) -> dict[str, float]:
    """Seconds of imports and of the merge, CPU seconds, and the peak resident memory of the process."""
    shutil.rmtree(out, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = dict(os.environ)
    watch = f"{code}\n{PEAK}"
    run = subprocess.run([python, "-c", watch, str(path), str(out), str(threads)], capture_output=True, text=True, env=env)
    if run.returncode:
        raise SystemExit(run.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *_, times, peak = run.stdout.strip().splitlines()
    start, seconds = map(float, times.split())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    shutil.rmtree(out, ignore_errors=True)
    return {"start": start, "seconds": seconds, "cpu": cpu, "peak": int(peak) / 1e6}


def floor(folder: Path, threads: int) -> float:
    """Seconds to read the four models and write one: what no merge can beat."""
    from temperament.delta.stream import Checkpoint
    from temperament.delta.sweep import sweep
    from temperament.delta.tensorfile import Entry, Writer

    sources = [Checkpoint(folder / f"m{i}") for i in range(4)]
    out = Path(tempfile.mkdtemp(dir=folder))
    table = {n.split("/", 1)[1]: Entry(e.dtype, e.shape) for n, e in sources[0].entries.items()}
    began = time.perf_counter()
    with Writer(out, table, shard_bytes=SHARD) as writer:
        sweep(lambda name, start, blocks, into: into.copy_(blocks[0]), sources, writer=writer, threads=threads or None)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


PROMISED = {"ties": 6.0, "dare_ties": 4.0, "linear": 3.0}  # seconds, at 178 M parameters on two cores


def run(options: Options) -> Result:
    millions = 30 if options.quick else 178
    peer = mergekit.installed()
    runs = [("temperament", sys.executable, OURS)] + ([("mergekit", peer, THEIRS)] if peer else [])
    result = Result("merge", "Merging", "", "ms")
    with tempfile.TemporaryDirectory(prefix="temperament-merge-") as work:
        folder = Path(work)
        count = make(folder, millions)
        size = f"three models and a base of {count / 1e6:.0f} M fp32 parameters each, sharded, from page cache to files"
        result.what = f"{size}; a process each, imports not counted." + ("" if peer else " mergekit could not be installed.")
        result.add("bytes read and written", {"floor": [Lap(floor(folder, options.threads), 0.0) for _ in range(3)]})
        peaks: dict[str, float] = {}
        for method in METHODS:
            path, laps = config(folder, method), {name: [] for name, *_ in runs}
            for turn in range(options.rounds or (1 if options.quick else 3)):  # in turn, so that a change of load meets both
                for name, python, code in runs if turn % 2 else reversed(runs):
                    row = measure(python, code, path, folder / "out", options.threads)
                    laps[name].append(Lap(row["seconds"], row["cpu"]))
                    peaks[f"{method} {name}"] = max(peaks.get(f"{method} {name}", 0.0), row["peak"])
            for name, of in laps.items():
                result.add(method, {name: of}, note=f"peak {peaks[f'{method} {name}']:.2f} GB")
            ours = statistics.median(x.wall for x in laps["temperament"])
            if not options.quick:
                result.promise(f"{method}, seconds", ours, at_most=PROMISED[method])
            if peer:
                result.promise(
                    f"{method}, times as fast as mergekit", ratio(laps["mergekit"], laps["temperament"]), at_least=1.0
                )
                over = peaks[f"{method} temperament"] / peaks[f"{method} mergekit"]
                result.promise(f"{method}, peak memory over mergekit's", over, at_most=1.0)
            result.promise(f"{method}, peak memory, GB", peaks[f"{method} temperament"], at_most=0.5)
        for m in range(4):
            shutil.rmtree(folder / f"m{m}")
        many = make(folder, (4 if options.quick else 8) * millions)
        row = measure(sys.executable, OURS, config(folder, "ties"), folder / "out", options.threads)
        grown = row["peak"] / peaks["ties temperament"]
        result.promise(f"ties at {many / 1e6:.0f} M, peak memory over that at {count / 1e6:.0f} M", grown, at_most=1.25)
    return result
