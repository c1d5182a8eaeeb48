"""A look at this machine: versions, devices, memory, disk, folders; for each problem what mends it. Nothing leaves it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from temperament.run.artefacts import cache_dir

SHOWN = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "peft", "datasets", "diffusers", "numpy")
EXTRAS = {
    "data": "Parquet files and Hugging Face datasets",
    "images": "folders of images",
    "merge": "merging models of different origin (merge.pleas)",
    "search": "temper merge --search",
    "test": "make test",
    "bench": "make bench",
}
SMALL_DISK, SMALL_MEMORY = 2e9, 2e9  # bytes below which something will go wrong soon


def doctor() -> dict[str, Any]:
    """{"ok", "problems": [{"what", "mend"}], "versions", "extras", "devices", "cpu", "memory", "folders", "settings"}; bytes.

    extras: what can be installed beside, and what is missing of it; that is no problem.
    """
    problems: list[dict[str, str]] = []
    found = {
        "versions": _versions(problems),
        "extras": _extras(),
        "devices": _devices(problems),
        "cpu": _cpu(problems),
        "memory": _memory(problems),
        "folders": _folders(problems),
        "settings": _settings(problems),
        "lab": _lab(problems),
    }
    return {"ok": not problems, "problems": problems, **found}


def _say(problems: list, what: str, mend: str) -> None:
    problems.append({"what": what, "mend": mend})


def _versions(problems: list) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "temperament": _version("temperament")}
    wanted = _wanted()
    for r in wanted:
        have = _version(r.name)
        if r.marker is None and have is None:
            _say(problems, f"{r.name} is not installed", f"pip install '{r}'")
        elif have is not None and not r.specifier.contains(have, prereleases=True) and (r.marker is None or r.name in SHOWN):
            _say(problems, f"{r.name} {have} lies outside {r.specifier}", f"pip install '{r.name}{r.specifier}'")
    return found | {name: _version(name) for name in SHOWN}


def _wanted() -> list[Any]:
    from packaging.requirements import Requirement

    try:
        return [Requirement(r) for r in metadata.requires("temperament") or ()]
    except metadata.PackageNotFoundError:
        return []


def _extras() -> list[dict[str, Any]]:
    found = []
    for name, use in EXTRAS.items():
        needed = [r for r in _wanted() if r.marker is not None and r.marker.evaluate({"extra": name})]
        missing = [r.name for r in needed if _version(r.name) is None]
        found.append({"name": name, "for": use, "missing": missing, "mend": f"pip install 'temperament[{name}]'"})
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(problems: list) -> list[dict[str, Any]]:
    try:
        import torch
    except Exception as problem:  # a broken installation fails in many ways
        _say(
            problems,
            f"torch does not load ({type(problem).__name__}: {str(problem)[:120]})",
            "reinstall it: pip install --force-reinstall torch",
        )
        return []
    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            try:
                free = torch.cuda.mem_get_info(i)[0]
                torch.ones(2, device=f"cuda:{i}").sum().item()
            except RuntimeError as problem:
                _say(
                    problems,
                    f"cuda:{i} ({about.name}) does not answer ({str(problem).splitlines()[0][:100]})",
                    "look at nvidia-smi; another process may hold it",
                )
                continue
            found.append(
                {
                    "device": f"cuda:{i}",
                    "name": about.name,
                    "memory": about.total_memory,
                    "free": free,
                    "bf16": torch.cuda.is_bf16_supported(),
                }
            )
    elif torch.version.cuda and shutil.which("nvidia-smi"):
        _say(
            problems,
            f"torch is built for CUDA {torch.version.cuda} and sees no GPU",
            "run nvidia-smi: the driver is missing, too old, or CUDA_VISIBLE_DEVICES hides it",
        )
    elif not torch.version.cuda and shutil.which("nvidia-smi"):
        _say(problems, "there is a GPU and torch is built without CUDA", "install a CUDA build of torch")
    return found


def _cpu(problems: list) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS")
    found = {"name": _cpu_name(), "cores": cores, "threads": None}
    if "torch" in sys.modules:
        found["threads"] = sys.modules["torch"].get_num_threads()
    if given and given.isdigit() and int(given) > cores:
        _say(problems, f"OMP_NUM_THREADS={given} on {cores} cores makes everything slower", f"set it to {cores} or unset it")
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory(problems: list) -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    if memory.available < SMALL_MEMORY:
        _say(
            problems,
            f"only {memory.available / 1e9:.1f} GB of memory are free",
            "close something; `temper plan` says what a recipe needs",
        )
    return {"total": memory.total, "free": memory.available}


def _folders(problems: list) -> list[dict[str, Any]]:
    hub = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    found = []
    for what, folder, matters in (
        ("here", Path.cwd(), True),
        ("scores of bases", cache_dir(), True),
        ("models of the hub", Path(hub), False),
    ):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        free, writes = shutil.disk_usage(there).free, _writes(there)
        found.append({"what": what, "folder": str(folder), "exists": folder.exists(), "writable": writes, "free": free})
        if matters and not writes:
            _say(
                problems,
                f"{folder} cannot be written",
                "set TEMPERAMENT_CACHE to a folder that can" if folder == cache_dir() else "go to a folder that can",
            )
        if matters and free < SMALL_DISK:
            _say(
                problems,
                f"only {free / 1e9:.1f} GB are free in {folder}",
                "free some, or set TEMPERAMENT_CACHE and --out to another disk",
            )
    return found


def _writes(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _settings(problems: list) -> dict[str, str]:
    """Environment variables that change what happens here. Values only where they are no secret."""
    names = (
        "TEMPERAMENT_CACHE",
        "TEMPERAMENT_TRACEBACK",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "RANK",
        "WORLD_SIZE",
        "PYTORCH_ENABLE_MPS_FALLBACK",
        "CUBLAS_WORKSPACE_CONFIG",
    )
    return {n: os.environ[n] for n in names if n in os.environ}


def _lab(problems: list) -> list[str]:
    from temperament import bases

    folder = Path(bases.__file__).parent / "lab"
    whole = [p for p in sorted(folder.glob("*")) if (p / "config.json").exists()] if folder.exists() else []
    for p in whole:
        weights = [p / "model.safetensors", p / "delta.safetensors"]  # some are kept as what differs from another
        if not any(w.exists() and w.stat().st_size >= 10_000 for w in weights):
            _say(
                problems,
                f"the weights of lab/{p.name} are missing",
                "reinstall temperament; in a clone, run `git lfs pull` or `make bases`",
            )
    if not whole:
        _say(problems, "no lab base is installed", "reinstall temperament; in a clone, run `make bases`")
    return [f"lab/{p.name}" for p in whole]
