"""A certificate: the files of an artefact, loaded again by a fresh process, compute what the live model did.

    certify(folder, inputs, logits)  ->  {"passed", "max_difference", "kl", "agreement", "files", ...}

The inputs and expected outputs travel as safetensors, the answer as JSON. The fresh process knows only what is on disk: it
finds a tied embedding saved untied, a tokenizer or template that differs, a key that no longer matches, a dtype that rounded.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from temperament.delta.files import read_json, write_json
from temperament.delta.hash import identity
from temperament.delta.stream import Checkpoint, open_source
from temperament.delta.tensorfile import write_tensors
from temperament.errors import UserError, WorkFailed

# What both tokenizers are asked.
TEXTS = ["The quick brown fox: 12 + 34 = 46.", " two  spaces\n\tand a tab", "naïve café 東京 🙂", ""]


def certify(
    folder: str | Path,
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    *,
    base: str | Path | None = None,
    reload: str | None = None,
    model_class: str = "AutoModelForCausalLM",
    live: nn.Module | None = None,
    processor=None,
    compute: str = "auto",
    trust: bool = False,
    tolerance: float = 1e-4,
    seconds: float = 600,
) -> dict:
    """Reload `folder` in a fresh process and compare its outputs on `inputs` with `expected`.

    folder: a model folder, or with `base` (a model folder) a delta or adapter on it.
    reload: "module:function" where a base is more than a folder (a version, a run): function(base, folder, trust) -> (model,
        identity).
    inputs: keyword tensors of the forward; expected: the live model's logits (..., classes).
    live: the live model; its tied names must be tied again. processor: the live tokenizer; ids and template must be the same.
    compute: dtype the reloaded model computes in ("auto": the one it is stored in), which is to be that of the live one.
    trust: may the fresh process run the Python of these folders, as the live one did?
    tolerance: largest difference in units of the spread of the expected logits (their standard deviation).

    Returns the record to keep beside the artefact; where `passed` is False, `failures` names what differs. WorkFailed if the
    fresh process cannot load the files at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("artefact folder", str(folder), "there is no such folder")
    assert expected.is_floating_point() and expected.dim() >= 1
    with tempfile.TemporaryDirectory(prefix="temperament-certificate-") as work:
        tensors = {f"input.{key}": value for key, value in inputs.items()} | {"expected": expected}
        write_tensors(work, {key: t.detach().cpu().contiguous() for key, t in tensors.items()}, "question")
        probe = TEXTS if processor is not None else None
        question = {
            "folder": str(folder.resolve()), "base": base and str(base if reload else Path(base).resolve()),
            "reload": reload, "model_class": model_class, "texts": probe, "compute": compute,
            "trust": trust,
        }  # fmt: skip
        write_json(Path(work) / "question.json", question)
        environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        here = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, environment.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "temperament.delta.certificate", work]
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise WorkFailed(f"{folder} did not load and answer in a fresh process within {seconds:g} s") from None
        answer = Path(work) / "answer.json"
        if run.returncode or not answer.is_file():
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise WorkFailed(f"{folder} does not load in a fresh process: {last[:300]}")
        found = read_json(answer, "certificate")
    ties = None if live is None else sorted(open_source(live).aliases)
    failures = []
    if found["max_difference"] is None or not found["max_difference"] <= tolerance * found["spread"]:
        failures.append("outputs")
    if ties is not None and ties != found["tied"]:
        failures.append("tied weights")
    if probe is not None and _encoded(processor, probe) != found["encoded"]:
        failures.append("tokenizer")
    kept = ("max_difference", "spread", "kl", "agreement", "first_difference", "tied", "files", "identity")
    return {"passed": not failures, "failures": failures, "tolerance": tolerance} | {key: found[key] for key in kept}


def compare(got: Tensor, expected: Tensor) -> dict:
    """Two logit tensors (..., classes): largest difference, KL(expected || got) in nats, share of equal argmax."""
    if got.shape != expected.shape:
        nothing = {"max_difference": None, "spread": None, "kl": None, "agreement": 0.0}
        return nothing | {"first_difference": f"shape {list(got.shape)} for {list(expected.shape)}"}
    got, expected = got.double(), expected.double()
    p, q = expected.log_softmax(-1), got.log_softmax(-1)
    same = (got.argmax(-1) == expected.argmax(-1)).flatten()
    difference = float((got - expected).abs().max())
    return {
        "max_difference": difference if difference == difference else None,  # None: NaN
        "spread": max(float(expected.std(unbiased=False)), 1e-12),
        "kl": float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0).nan_to_num(1e30)),
        "agreement": float(same.double().mean()),
        "first_difference": None if bool(same.all()) else int((~same).nonzero()[0]),
    }


def _encoded(processor, texts: list[str]) -> list:
    """Ids of the probe texts, and of a rendered conversation where there is a template."""
    found: list = [list(map(int, processor(text)["input_ids"])) for text in texts]
    if getattr(processor, "chat_template", None):
        chat = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
        found.append(processor.apply_chat_template(chat, tokenize=False))
    return found


def _reloaded(folder: Path, base: str | None, name: str, compute: str, trust: bool) -> tuple[nn.Module, dict[str, str]]:
    import transformers

    from temperament.delta.delta import Delta

    if not name.startswith("AutoModel") or not hasattr(transformers, name):
        raise UserError("model class", name, "use one of transformers' AutoModel classes")
    how = {"dtype": compute, "local_files_only": True, "trust_remote_code": trust}
    model = getattr(transformers, name).from_pretrained(base or folder, **how).eval()
    if base is not None:
        delta = Delta.load(folder)
        delta.check_base(identity(base, *delta.components[:1])).apply(model)
    return model, identity(base or folder)


def _answer(work: Path) -> None:
    """In the fresh process."""
    question = read_json(work / "question.json", "certificate")
    source = Checkpoint(work / "question.safetensors", "q")
    folder, base = Path(question["folder"]), question["base"]
    if question["reload"]:
        module, _, function = question["reload"].partition(":")
        model, who = getattr(importlib.import_module(module), function)(base, folder, question["trust"])
    else:
        model, who = _reloaded(folder, base, question["model_class"], question["compute"], question["trust"])
    inputs = {key.removeprefix("q/input."): source.read(key) for key in source.names if key.startswith("q/input.")}
    with torch.no_grad():
        out = model(**inputs)
    out = out if isinstance(out, Tensor) else getattr(out, "logits", out[0])
    found = compare(out, source.read("q/expected"))
    found["tied"] = sorted(open_source(model).aliases)
    found["identity"] = who
    found["files"] = sorted(p.name for p in folder.iterdir() if p.is_file())
    found["encoded"] = None
    if question["texts"] is not None:
        import transformers

        found["encoded"] = _encoded(transformers.AutoTokenizer.from_pretrained(folder), question["texts"])
    (work / "answer.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
