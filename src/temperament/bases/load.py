"""A base: named components with their processors, and who they are.

    lab/lm, lab/lm@half     ships with the package (a version after the @)
    path/to/folder          transformers layout; a run folder or an adapter folder is loaded as its base with its delta applied
    org/name                a Hugging Face id, where a hub is reachable
    an nn.Module            in Python

Every parameter is addressed `component/path`; identity is a sha256 per component. Weights are loaded in fp32 unless asked (the master
weights of training); nothing but safetensors is read, and remote code stays off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from temperament import parts
from temperament.delta import Addition, Delta, identity
from temperament.errors import UserError, nearest
from temperament.nn.pieces import Switch, attach

LAB = Path(__file__).parent / "lab"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Base:
    id: str
    components: dict[str, nn.Module]
    processors: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    suites: list[Any] = field(default_factory=list)  # parts that measure what this base is meant to know
    originals: dict[str, Tensor] = field(default_factory=dict)  # what applied deltas replaced: the pure base's tensors
    switch: Switch = field(default_factory=Switch)  # of the modules that applied deltas added
    hung: list[Callable[[], None]] = field(default_factory=list)  # what takes each of them away

    def __post_init__(self):
        _ = self._slots  # found while every parameter is in its place; versions swap them later
        if not self.sha256:
            for name, module in self.components.items():
                self.sha256 |= identity(module, name)

    @property
    def model(self) -> nn.Module:
        return next(iter(self.components.values()))

    @property
    def tokenizer(self) -> Any:
        return self.processors.get("tokenizer")

    @cached_property
    def places(self):
        from temperament.nn.places import Places

        return Places.of(self.components)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("component/path", parameter), tied ones once."""
        for component, module in self.components.items():
            for name, p in module.named_parameters():
                yield f"{component}/{name}", p

    @cached_property
    def _slots(self) -> dict[str, list[tuple[dict, str]]]:
        by_id: dict[int, list[tuple[dict, str]]] = {}
        for module in self.components.values():
            for m in module.modules():
                for key, p in m._parameters.items():
                    by_id.setdefault(id(p), []).append((m._parameters, key))
        return {name: by_id[id(p)] for name, p in self.parameters()}

    def slots(self, name: str) -> list[tuple[dict, str]]:
        """Where the parameter `name` hangs: every (parameter dict, key), ties included."""
        return self._slots[name]

    @torch.no_grad()
    def apply(self, delta: Delta, strength: float = 1.0) -> None:
        """Add a delta to the live weights, keeping what it replaces in `originals`; what it adds is built by its parts."""
        known = dict(self.parameters())
        for name, change in delta.changes.items():
            if name not in known:
                raise UserError("delta", name, "the base has no such parameter; the delta was made for another architecture")
            p = known[name]
            self.originals.setdefault(name, p.detach().clone())
            p.data = change.scaled(strength * delta.strength).apply(p.detach()).to(p)
        for name, addition in delta.additions.items():
            if addition.ship:
                self._hang(name, replace(addition, strength=addition.strength * delta.strength * strength))

    def _hang(self, name: str, addition: Addition) -> None:
        """Build an added module by its part and attach it; it is frozen, and off where the base is asked for."""
        part = parts.build({addition.part: dict(addition.config)}, field=f"delta.{name}")
        module, around = part.rebuild(self, name, addition)
        around.strength = addition.strength
        around.to(next(module.parameters()).device).requires_grad_(False)
        self.hung.append(attach(module, around, self.switch))

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Without the modules that applied deltas added."""
        was, self.switch.on = self.switch.on, False
        try:
            yield
        finally:
            self.switch.on = was

    @contextmanager
    def at(self, version: str = "live") -> Iterator[nn.Module]:
        """The model with its applied deltas ("live"), or the pure base ("base"); by pointer."""
        undo = []
        try:
            if version == "base":
                found = {name: self.slots(name) for name in self.originals}
                for name, tensor in self.originals.items():
                    for table, key in found[name]:
                        undo.append((table, key, table[key]))
                        table[key] = tensor
            with self.bare() if version == "base" else nullcontext():
                yield self.model
        finally:
            for table, key, old in undo:
                table[key] = old

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the pure base."""
        while self.hung:
            self.hung.pop()()
        known = dict(self.parameters())
        for name, tensor in self.originals.items():
            known[name].data = tensor.clone()
        self.originals = {}


def load(spec: str | Path | nn.Module | Base, *, dtype: str = "fp32", device: str | torch.device = "cpu", trust_remote_code: bool = False, field: str = "base") -> Base:
    """The base a recipe names. Raises UserError naming the field, the value and the mend."""
    if isinstance(spec, Base):
        return spec
    if isinstance(spec, nn.Module):
        return Base("python", {"lm": spec})
    spec = str(spec)
    folder = locate(spec, field)
    if folder is not None and (folder / "run.json").exists():
        return _tuned(json.loads((folder / "run.json").read_text())["base"]["id"], folder / "delta", dtype, device, trust_remote_code, field)
    if folder is not None and (folder / "adapter_config.json").exists():
        named = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if not named:
            raise UserError(field, spec, "this adapter does not say which base it was made for; name the base, and the adapter as a step or --delta")
        return _tuned(named, folder, dtype, device, trust_remote_code, field)
    if folder is not None and spec.startswith("lab/") and (folder / "delta.json").exists():
        return _kept_as_delta(spec, folder, dtype, device)
    base = _from_pretrained(spec, folder, dtype, trust_remote_code, field)
    for module in base.components.values():
        module.to(device).eval()
    if spec.startswith("lab/"):
        base.suites = ["evaluate.control" if "policy" in base.components else "evaluate.lab"]
    if folder is not None and (version := spec.partition("@")[2]) and spec.startswith("lab/"):
        _load_version(base, folder / "versions" / version / "model.safetensors")
    return base


def _kept_as_delta(spec: str, folder: Path, dtype: str, device: Any) -> Base:
    """A lab base that is kept as what differs from the one it was tuned on; loaded, it is a base of its own."""
    delta = Delta.load(folder)
    start = load(delta.meta["on"], dtype=dtype, device=device)
    start.apply(delta.check_base(start.sha256))
    start.model.generation_config = type(start.model.generation_config).from_pretrained(folder)
    tokenizer = type(start.tokenizer).from_pretrained(folder)
    return Base(spec, start.components, {"tokenizer": tokenizer}, None, suites=["evaluate.lab"])


def _tuned(named: str, delta_folder: Path, dtype: str, device: Any, trust: bool, field: str) -> Base:
    base = load(named, dtype=dtype, device=device, trust_remote_code=trust, field=field)
    delta = Delta.load(delta_folder)
    delta.check_base(base.sha256)
    base.apply(delta)
    return base


def locate(spec: str, field: str = "base") -> Path | None:
    """The folder a base names, or None for a hub id. Lab names and versions are checked here, before anything is loaded."""
    if spec.startswith("lab/"):
        name, _, version = spec[4:].partition("@")
        folder = LAB / name
        known = sorted(p.name for p in LAB.iterdir() if (p / "config.json").exists()) if LAB.exists() else []
        if name not in known:
            raise UserError(field, spec, f"no such lab base; {nearest(spec, ['lab/' + k for k in known])}")
        versions = sorted(p.name for p in (folder / "versions").iterdir()) if (folder / "versions").exists() else []
        if version and version not in versions:
            raise UserError(field, spec, f"no such version; {nearest(version, versions) if versions else 'it has none'}")
        return folder
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(field, spec, "a base is a folder or a Hugging Face id, not a file")
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UserError(field, spec, "no such folder")
    return None


def _from_pretrained(spec: str, folder: Path | None, dtype: str, trust: bool, field: str) -> Base:
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    source = str(folder) if folder is not None else spec
    if folder is not None:
        if not (folder / "config.json").exists():
            raise UserError(field, spec, "no config.json in it; name a folder in transformers layout, a run or an adapter")
        if not any(folder.glob("*.safetensors")):
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            why = f"its weights are a pickle ({pickles[0]}), which is never loaded; convert it to safetensors" if pickles else "it holds no .safetensors weights"
            raise UserError(field, spec, why)
    options = {"trust_remote_code": trust, "local_files_only": folder is not None}
    if (ours := shell(folder)) is not None:
        return _own(spec, folder, ours, dtype, field)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        model_class, component = _model_class(config, transformers)
        model = model_class.from_pretrained(source, dtype=DTYPES[dtype], use_safetensors=True, **options)
    except UserError:
        raise
    except Exception as problem:
        first = str(problem).strip().split("\n")[0][:200]
        mend = "the file is damaged or truncated" if "safetensor" in repr(problem).lower() or "header" in first.lower() else "it could not be loaded"
        raise UserError(field, spec, f"{mend} ({first}); name a folder with config.json and safetensors, a lab base (lab/lm) or a reachable Hugging Face id") from None
    processors = {}
    try:
        processors["tokenizer"] = AutoTokenizer.from_pretrained(source, **options)
    except Exception as problem:
        if folder is not None and (folder / "tokenizer.json").exists():
            raise UserError(field, spec, f"its tokenizer could not be read ({str(problem).strip().splitlines()[0][:160]})") from None
    return Base(spec, {component: model}, processors, folder, _identity(source, folder, component))


def shell(folder: Path | None) -> nn.Module | None:
    """The model of this folder, with weights of no meaning, where it is of an architecture of our own; else None."""
    from temperament.nn.policy import MODEL_TYPE, Policy

    config = json.loads((folder / "config.json").read_text()) if folder is not None and (folder / "config.json").exists() else {}
    return Policy.shell(config) if config.get("model_type") == MODEL_TYPE else None


def _own(spec: str, folder: Path, model: nn.Module, dtype: str, field: str) -> Base:
    try:
        model = type(model).from_pretrained(folder).to(DTYPES[dtype])
    except Exception as problem:
        raise UserError(field, spec, f"it could not be loaded ({str(problem).strip().splitlines()[0][:160]})") from None
    return Base(spec, {"policy": model}, {}, folder, _identity(str(folder), folder, "policy"))


def _identity(source: str, folder: Path | None, component: str) -> dict[str, str]:
    """Who a base is: the sha256 of its weights as they are stored, so that it is the same base in whatever precision it is loaded."""
    if folder is None:
        from transformers.utils import cached_file

        folder = Path(cached_file(source, "config.json", local_files_only=True)).parent
    return identity(folder, component)


def _model_class(config: Any, transformers: Any) -> tuple[type, str]:
    """The class that carries a loss for this configuration, and the component's name."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if config.is_encoder_decoder and "Whisper" not in architecture:
        return transformers.AutoModelForSeq2SeqLM, "lm"
    if "MaskedLM" in architecture:
        return transformers.AutoModelForMaskedLM, "encoder"
    if "ImageClassification" in architecture:
        return transformers.AutoModelForImageClassification, "image_encoder"
    if "SequenceClassification" in architecture:
        return transformers.AutoModelForSequenceClassification, "encoder"
    return transformers.AutoModelForCausalLM, "lm"


@torch.no_grad()
def _load_version(base: Base, file: Path) -> None:
    from safetensors.torch import load_file

    known = dict(base.parameters())
    component = next(iter(base.components))
    for name, tensor in load_file(file).items():
        known[f"{component}/{name}"].copy_(tensor.to(known[f"{component}/{name}"]))
    base.sha256 = identity(base.components[component], component)
