"""A base: named components with their processors, and who they are.

    lab/lm, lab/lm@half     ships with the package (a version after the @)
    path/to/folder          transformers layout
    runs/first, adapters/a  what was made on a base (bases/kept.py): that base with the change applied, or a base of its own
    org/name                a Hugging Face id, where a hub is reachable
    an nn.Module            in Python

Every parameter is addressed `component/path`; identity is a sha256 per component. Weights are loaded in fp32 unless asked
(the master weights of training); nothing but safetensors is read, and remote code stays off."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from temperament import parts
from temperament.bases.image_settings import image_settings
from temperament.bases.kept import Kept, kept
from temperament.bases.pipeline import pipeline_of, read_pipeline
from temperament.delta import Addition, Delta, identity
from temperament.delta.peft_format import is_peft, read_peft
from temperament.delta.stream import finite, open_source
from temperament.delta.use import new_value
from temperament.errors import UserError, nearest
from temperament.nn.pieces import Switch, attach

LAB = Path(__file__).parent / "lab"
# What shows that a lab base knows what it is meant to know, by the component it has; of the others, evaluate.lab.
MEANT = {"policy": "evaluate.control", "denoiser": "evaluate.renders"}
MEANT |= dict.fromkeys(("image_encoder", "encoder"), "evaluate.pictures")
NEVER_TRAINED = ("codec",)  # what pictures are made in, not what makes them: it holds no places
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
    inference: list[Any] = field(default_factory=list)  # decoding parts of the run it is, where it is one
    stored: str = "fp32"  # precision of its weights on disk, which is what a merged model is written in
    trusted: bool = False  # was the Python of its folder allowed to run?

    def __post_init__(self):
        _ = self._slots  # found while every parameter is in its place; versions swap them later
        if not self.sha256:
            for name, module in self.components.items():
                self.sha256 |= identity(module, name)

    @cached_property
    def reading(self) -> str:
        """sha256 of what decides how these weights are used: configuration, precision, tokenizer and its chat template. Scores
        and steps are addressed by it beside the weights."""
        told = [{n: _settings(m) for n, m in self.components.items()}, _words(self.tokenizer)]
        if (pictures := self.processors.get("image")) is not None:
            told.append({n: getattr(pictures, n, None) for n in ("size", "crop_size", "image_mean", "image_std")})
        if (scheduler := self.processors.get("scheduler")) is not None:
            told.append(dict(getattr(scheduler, "config", scheduler)))
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def model(self) -> nn.Module:
        return next(iter(self.components.values()))

    @property
    def tokenizer(self) -> Any:
        return self.processors.get("tokenizer")

    @cached_property
    def places(self):
        from temperament.nn.places import Places

        return Places.of({n: m for n, m in self.components.items() if n not in NEVER_TRAINED})

    @property
    def keeps(self) -> str | None:
        """The suite that asks what a base of this kind knows without any benchmark; None where there is none."""
        return "evaluate.keep" if self.speaks else "evaluate.keep_pictures" if "denoiser" in self.components else None

    @property
    def speaks(self) -> bool:
        """Is it a language model: does it say tokens?"""
        head = getattr(self.model, "get_output_embeddings", None)
        return self.tokenizer is not None and head is not None and head() is not None

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("component/path", parameter), tied ones once."""
        for component, module in self.components.items():
            for name, p in module.named_parameters():
                yield f"{component}/{name}", p

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """("component/path", buffer): statistics and counters."""
        for component, module in self.components.items():
            for name, b in module.named_buffers():
                yield f"{component}/{name}", b

    @cached_property
    def _slots(self) -> dict[str, list[tuple[dict, str]]]:
        by_id: dict[int, list[tuple[dict, str]]] = {}
        for module in self.components.values():
            for m in module.modules():
                for table in (m._parameters, m._buffers):
                    for key, p in table.items():
                        by_id.setdefault(id(p), []).append((table, key))
        return {name: by_id[id(p)] for name, p in (*self.parameters(), *self.buffers())}

    def slots(self, name: str) -> list[tuple[dict, str]]:
        """Where the parameter or buffer `name` hangs: every (dict of them, key), ties included."""
        return self._slots[name]

    @torch.no_grad()
    def apply(self, delta: Delta, strength: float = 1.0) -> None:
        """Add a delta to the live weights, keeping what it replaces in `originals`; what it adds is built by its parts."""
        known = {**dict(self.parameters()), **dict(self.buffers())}
        delta = delta * strength
        for name in (*delta.changes, *delta.buffers):
            if name not in known:
                raise UserError("delta", name, "the base has no such parameter; the delta was made for another architecture")
            p = known[name]
            new = new_value(delta, name, p.detach())  # a delta from disk lies on the CPU, whatever the base is on
            self.originals.setdefault(name, p.detach().clone())
            p.data = new.to(p)
        for name, addition in delta.additions.items():
            if addition.ship:
                self._hang(name, replace(addition, strength=addition.strength * delta.strength))

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
        known = {**dict(self.parameters()), **dict(self.buffers())}
        for name, tensor in self.originals.items():
            known[name].data = tensor.clone()
        self.originals, self.inference = {}, []


def load(
    spec: str | Path | nn.Module | Base,
    *,
    dtype: str = "fp32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    field: str = "base",
    own: bool = False,
) -> Base:
    """The base a recipe names. Raises UserError naming the field, the value and the mend.

    own: where a change on another base is named, the result is a base of its own, as what is tuned further must be; otherwise
    the change stays apart from what it was made on, so that both can be asked for.
    """
    if isinstance(spec, Base):
        return spec
    if isinstance(spec, nn.Module):
        return Base("python", {"lm": spec})
    _reachable(device)
    spec = str(spec)
    folder = locate(spec, field)
    found = kept(folder, field) if folder is not None else None
    how = {"device": device, "trust_remote_code": trust_remote_code, "field": field}
    if found is not None and spec.startswith("lab/"):
        return _shipped(spec, folder, found, dtype, how)
    if found is not None:
        base = load(found.named(field, spec), dtype="fp32" if own else dtype, own=True, **how)
        if found.delta is not None:
            base.apply(change(found.delta, base))
        return _own(base, spec, dtype, field) if own else base
    version = spec.partition("@")[2] if spec.startswith("lab/") else ""
    base = _from_pretrained(spec, folder, "fp32" if version else dtype, trust_remote_code, field)
    base.trusted = trust_remote_code
    for module in base.components.values():
        module.to(device).eval()
    if spec.startswith("lab/"):
        base.suites = [next((MEANT[c] for c in base.components if c in MEANT), "evaluate.lab")]
    if version:
        _load_version(base, folder / "versions" / version / "model.safetensors")
        base = _own(base, spec, dtype, field)
    return base


def _shipped(spec: str, folder: Path, found: Kept, dtype: str, how: dict[str, Any]) -> Base:
    """A lab base that is kept as what differs from the one it was tuned on."""
    base = load(found.named("base", spec), **how)
    base.apply(change(found.delta, base))
    base.model.generation_config = type(base.model.generation_config).from_pretrained(folder)
    base.processors["tokenizer"] = type(base.tokenizer).from_pretrained(folder)
    return _own(base, spec, dtype, "base")


def change(folder: Path, base: Base) -> Delta:
    """The change kept in a folder, ours or a PEFT adapter, made on this base; the base's modules must be pure."""
    if not is_peft(folder):
        return Delta.load(folder).check_base(base.sha256)
    component = next(iter(base.components))
    return read_peft(folder, base.components[component], component).check_base(base.sha256)


def _own(base: Base, spec: str, dtype: str, field: str) -> Base:
    """The loaded base with its changes as a base of its own; loaded in fp32, as who it is must not hang on the precision."""
    if base.hung:
        mend = "it adds a module to its base, so it is no base of its own; tune on in a further step of its recipe"
        raise UserError(field, spec, mend)
    made = Base(spec, base.components, base.processors, suites=base.suites, stored=base.stored, trusted=base.trusted)
    for module in made.components.values():
        module.to(DTYPES[dtype])
    return made


def locate(spec: str, field: str = "base") -> Path | None:
    """The folder a base names, or None for a hub id. Lab names and versions are checked here, before anything is loaded."""
    if spec.startswith("lab/"):
        name, _, version = spec[4:].partition("@")
        folder = LAB / name
        named = ("config.json", "model_index.json")
        known = sorted(p.name for p in LAB.iterdir() if any((p / n).exists() for n in named)) if LAB.exists() else []
        if name not in known:
            raise UserError(field, spec, f"no such lab base; {nearest(spec, ['lab/' + k for k in known])}")
        versions = sorted(p.name for p in (folder / "versions").iterdir()) if (folder / "versions").exists() else []
        if version and version not in versions:
            raise UserError(field, spec, f"no such version; {nearest(version, versions) if versions else 'it has none'}")
        return folder
    if not spec.strip():
        raise UserError(field, spec, "name a lab base (lab/lm), a folder or a Hugging Face id")
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(field, spec, "a base is a folder or a Hugging Face id, not a file")
    if "://" in spec:
        raise UserError(field, spec, "give a folder, or a Hugging Face id as org/name, not an address")
    near = sorted(str(p) for p in path.parent.iterdir() if p.is_dir()) if path.parent != Path() and path.parent.is_dir() else []
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or near:
        raise UserError(field, spec, f"no such folder; {nearest(spec, near)}" if near else "no such folder")
    return None


def _from_pretrained(spec: str, folder: Path | None, dtype: str, trust: bool, field: str) -> Base:
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    source = str(folder) if folder is not None else spec
    if (whole := pipeline_of(spec, folder, field)) is not None:
        components, processors, sha256 = read_pipeline(whole, spec, DTYPES[dtype], field)
        return Base(spec, components, processors, whole, sha256, stored=_stored(whole))
    if folder is not None:
        if not (folder / "config.json").exists():
            raise UserError(field, spec, "no config.json in it; name a folder in transformers layout, a run or an adapter")
        if not any(folder.glob("*.safetensors")):
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            why = (
                f"its weights are a pickle ({pickles[0]}), which is never loaded; convert it to safetensors"
                if pickles
                else "it holds no .safetensors weights"
            )
            raise UserError(field, spec, why)
    options = {"trust_remote_code": trust, "local_files_only": folder is not None}
    if (ours := shell(folder)) is not None:
        return _of_ours(spec, folder, ours, dtype, field)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        model_class, component = _model_class(config, transformers)
        options_ = {"dtype": DTYPES[dtype], "use_safetensors": True, "output_loading_info": True}
        model, told = model_class.from_pretrained(source, **options_, **options)
    except UserError:
        raise
    except Exception as problem:
        first = str(problem).strip().split("\n")[0][:200]
        if "ignore_mismatched_sizes" in first:
            raise UserError(field, spec, "its weights have other shapes than its config.json says; copy both again") from None
        mend = (
            "the file is damaged or truncated"
            if "safetensor" in repr(problem).lower() or "header" in first.lower()
            else "it could not be loaded"
        )
        raise UserError(
            field,
            spec,
            f"{mend} ({first}); name a folder with config.json and safetensors, a lab base or a reachable Hugging Face id",
        ) from None
    _whole(model, told, spec, field)
    processors: dict[str, Any] = {}
    if (pictures := image_settings(source, folder, field)) is not None:
        processors["image"] = pictures
    try:
        processors["tokenizer"] = AutoTokenizer.from_pretrained(source, **options)
    except Exception as problem:
        if folder is not None and (folder / "tokenizer.json").exists():
            why = f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
            raise UserError(field, spec, f"its tokenizer.json could not be read ({why}); copy it again") from None
    at = _files(source, folder)
    return Base(spec, {component: model}, processors, folder, identity(at, component), stored=_stored(at))


def _whole(model: nn.Module, told: dict[str, Any], spec: str, field: str) -> None:
    """Refuse weights of which some are missing, which would be drawn at random, or are no numbers."""
    if missing := sorted(told.get("missing_keys") or ()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        why = f"its weights lack {missing[0]}{more}, which would be random; copy the folder again, or name another"
        raise UserError(field, spec, why)
    for name, p in model.named_parameters():
        if not finite(p.detach()):
            raise UserError(field, spec, f"its {name} holds NaN or infinite numbers; copy the folder again, or use another")


def _reachable(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(
            "device", str(device), f"this machine has no such device; use auto or one of {', '.join(found)}"
        ) from None


def shell(folder: Path | None) -> nn.Module | None:
    """The model of this folder, with weights of no meaning, where it is of an architecture of our own; else None."""
    from temperament.nn.policy import MODEL_TYPE, Policy

    config = (
        json.loads((folder / "config.json").read_text()) if folder is not None and (folder / "config.json").exists() else {}
    )
    return Policy.shell(config) if config.get("model_type") == MODEL_TYPE else None


def _of_ours(spec: str, folder: Path, model: nn.Module, dtype: str, field: str) -> Base:
    try:
        model = type(model).from_pretrained(folder).to(DTYPES[dtype])
    except Exception as problem:
        raise UserError(field, spec, f"it could not be loaded ({str(problem).strip().splitlines()[0][:160]})") from None
    return Base(spec, {"policy": model}, {}, folder, identity(folder, "policy"), stored=_stored(folder))


def _files(source: str, folder: Path | None) -> Path:
    """Where the weights lie. Who a base is, is their sha256 as they are stored, so that it is the same base in whatever
    precision it is loaded."""
    if folder is None:
        from transformers.utils import cached_file

        folder = Path(cached_file(source, "config.json", local_files_only=True)).parent
    return folder


def _stored(folder: Path) -> str:
    """The precision most of these weights are stored in; what is no precision of ours is read as fp32."""
    sizes: Counter = Counter()
    for entry in open_source(folder).entries.values():
        sizes[entry.dtype] += entry.numel if entry.dtype.is_floating_point else 0
    most = max(sizes, key=sizes.get, default=None)
    return next((name for name, dtype in DTYPES.items() if dtype == most), "fp32")


DUAL = ("CLIPModel",)  # an image encoder and a text encoder in one space, loaded as one component


def _model_class(config: Any, transformers: Any) -> tuple[type, str]:
    """The class that carries a loss for this configuration, and the component's name."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if config.is_encoder_decoder and "Whisper" not in architecture:
        return transformers.AutoModelForSeq2SeqLM, "lm"
    if architecture in DUAL:
        return transformers.AutoModel, "encoder"
    if "MaskedLM" in architecture:
        return transformers.AutoModelForMaskedLM, "encoder"
    if "ImageClassification" in architecture:
        return transformers.AutoModelForImageClassification, "image_encoder"
    if "SequenceClassification" in architecture:
        return transformers.AutoModelForSequenceClassification, "encoder"
    return transformers.AutoModelForCausalLM, "lm"


VOLATILE = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")  # they change no result


def _settings(module: nn.Module) -> list[Any]:
    """What a module computes with beside its weights, and their precision."""
    configs = [getattr(module, name, None) for name in ("config", "generation_config")]
    plain = [c.to_dict() if hasattr(c, "to_dict") else vars(c) if c is not None else {} for c in configs]
    dtypes = sorted({str(p.dtype) for p in module.parameters()})
    return [{k: v for k, v in c.items() if k not in VOLATILE} for c in plain] + [dtypes]


def _words(tokenizer: Any) -> Any:
    """How a tokenizer reads and renders; not how a caller has last set it to pad."""
    if tokenizer is None:
        return None
    fast = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(fast.to_str()) if fast is not None else tokenizer.get_vocab()
    for name in ("truncation", "padding"):
        model.pop(name, None) if fast is not None else None
    return [model, tokenizer.special_tokens_map, tokenizer.chat_template]


@torch.no_grad()
def _load_version(base: Base, file: Path) -> None:
    from safetensors.torch import load_file

    known = dict(base.parameters())
    component = next(iter(base.components))
    for name, tensor in load_file(file).items():
        known[f"{component}/{name}"].copy_(tensor.to(known[f"{component}/{name}"]))
