"""Train the lab's language models: `python -m temperament.bases.train_lm tokenizer|lm|lm-small|lm-large|lm-instruct`.

Llama shape, tied embeddings, packed rows of whole documents with block-diagonal attention. Muon for the matrices of the blocks,
AdamW for embeddings and norms; linear warm-up, then constant, then linear decay over the last part. A fixed seed; rows are made
as they are needed. State is written now and then, so that a stopped training goes on (`--resume`).
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from .corpus import Corpus, encoded, packed
from .worlds import skills

LAB = Path(__file__).parent / "lab"
log = logging.getLogger("temperament.train_lm")

MIXTURE = {
    "add": 5, "subtract": 10, "compare": 2, "add-steps": 4, "multiply": 4, "story": 5, "add3": 2, "workout": 3,
    "copy": 6, "reverse": 6, "sort": 7, "rotate": 4, "upper": 2, "count": 5, "stack": 5, "sort-long": 0.5,
    "keys": 12, "notes": 12, "boxes": 14, "people": 13, "places": 6, "text": 14,
}  # fmt: skip
FORMATS = {
    "chat": 4, "json": 6, "list": 4, "capitals": 5, "sentence": 4, "yes-no": 3, "judge": 11, "tool": 3,
    "chat-steps": 3, "refuse": 4, "harmless": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How one base is made. A step is `rows` rows of `length` tokens; `keep` maps a step to the name of a version kept from
    there."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    steps: int
    rows: int = 24
    length: int = 160
    rate: float = 0.02  # Muon
    adam_rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.6  # share of the steps, at the end, in which the rate falls linearly to 0
    weight_decay: float = 0.01
    prompt_weight: float = 0.2
    dense: tuple[float, float] = (0.9, 0.6)  # share of many-question documents where a skill has them, at start and end
    seed: int = 0
    start: str | None = None
    mixture: dict[str, float] = field(default_factory=lambda: dict(MIXTURE))
    keep: dict[int, str] = field(default_factory=dict)


PLANS = {
    "lm": Plan(192, 4, 6, 2, 512, steps=7400, keep={500: "early", 1000: "half"}),
    "lm-small": Plan(128, 3, 4, 2, 320, steps=4000),
    # grown from lm: the same function at the start, twice the layers and twice the inner width; knows more people
    "lm-large": Plan(192, 8, 6, 2, 1024, steps=900, rate=0.012, start="lm", mixture={**MIXTURE, "people": 20, "strangers": 40}),
    "lm-instruct": Plan(
        192, 4, 6, 2, 512, steps=2200, rate=0.008, adam_rate=1e-3, start="lm",
        mixture={**MIXTURE, **{k: 2.5 * v for k, v in FORMATS.items()}},
    ),
}  # fmt: skip


def new_model(plan: Plan, vocabulary: int = 1024):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(plan.seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=plan.width, num_hidden_layers=plan.layers, num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads, intermediate_size=plan.inner, max_position_embeddings=512, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [1, 6]
    model.generation_config.pad_token_id = 2
    model.generation_config.bos_token_id = 0
    return model


@torch.no_grad()
def grow(model, plan: Plan):
    """A larger model that computes the same function: new layers after old ones add nothing yet (their last maps are zero), new
    units of an MLP are read by nothing yet (their columns of `down` are zero)."""
    large = new_model(plan, model.config.vocab_size)
    old, new = model.model, large.model
    new.embed_tokens.weight.copy_(old.embed_tokens.weight)
    new.norm.weight.copy_(old.norm.weight)
    times = plan.layers // len(old.layers)
    for i, layer in enumerate(new.layers):
        if i % times:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            continue
        for name, weight in old.layers[i // times].named_parameters():
            target = layer.get_parameter(name)
            if "down_proj" in name:
                target.zero_()
            target[tuple(slice(n) for n in weight.shape)].copy_(weight)
    return large


def save(model, folder: Path) -> None:
    """The model in fp16, with its tokenizer, as transformers reads it."""
    import copy

    half = copy.deepcopy(model).to(torch.float16)
    half.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # fp16 is for the disk only: a plain from_pretrained computes in fp32
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(LAB / "tokenizer" / name, folder / name)


def packed_attention(module, query, key, value, mask, scaling=None, **_):
    """Plain attention with a boolean mask, key-value heads never repeated: on a CPU and short rows a third faster than SDPA.

    query (rows, heads, length, d); key, value (rows, kv heads, length, d); mask (rows, 1, length, length), True where seen.
    """
    rows, heads, length, d = query.shape
    kv = key.shape[1]
    scores = torch.matmul((query * scaling).reshape(rows, kv, heads // kv * length, d), key.transpose(-1, -2))
    scores = scores.view(rows, kv, heads // kv, length, length).masked_fill(~mask[:, :, None], -1e4)
    weights = scores.softmax(-1).to(value.dtype).view(rows, kv, heads // kv * length, length)
    return torch.matmul(weights, value).view(rows, heads, length, d).transpose(1, 2), None


AttentionInterface.register("lab_packed", packed_attention)


def batch_of(rows, length: int):
    """Rows to tensors: ids, labels, weights (rows, length), positions inside the document, mask (rows, 1, length, length)."""
    n = len(rows)
    ids = torch.full((n, length), 2)
    weights, document = torch.zeros(n, length), torch.full((n, length), -1)
    for i, (tokens, weight, number) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        weights[i, : len(tokens)] = torch.tensor(weight)
        document[i, : len(tokens)] = torch.tensor(number)
    place = torch.arange(length).expand(n, length)
    first = torch.ones_like(document, dtype=torch.bool)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    position = place - torch.where(first, place, 0).cummax(1).values
    mask = (document[:, :, None] == document[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    ahead = torch.zeros_like(weights)
    ahead[:, :-1] = weights[:, 1:] * (document[:, 1:] == document[:, :-1])
    return ids, labels, ahead, position, mask[:, None]


class Rows:
    """The endless rows of a plan, made in chunks; the address of a chunk is its number, so a resumed training reads on."""

    def __init__(self, plan: Plan, tokenizer, chunk_steps: int = 25, store: Path | None = None):
        self.store = store
        self.plan, self.tokenizer, self.chunk_steps = plan, tokenizer, chunk_steps
        self.chunk, self.ready = -1, []

    def step(self, number: int):
        chunk, place = divmod(number, self.chunk_steps)
        if chunk != self.chunk:
            plan, share = self.plan, number / self.plan.steps
            dense = plan.dense[0] + (plan.dense[1] - plan.dense[0]) * share
            corpus = Corpus(plan.mixture, plan.seed * 1_000_003 + chunk, dense, self.store)
            need = self.chunk_steps * plan.rows
            rows: list = []

            def documents():
                while True:
                    yield from encoded(corpus, self.tokenizer, 2000, plan.length, plan.prompt_weight)

            for row in packed(documents(), plan.length):
                rows.append(row)
                if len(rows) == need:
                    break
            self.chunk, self.ready = chunk, rows
        return batch_of(self.ready[place * self.plan.rows : (place + 1) * self.plan.rows], self.plan.length)


def rate_at(plan: Plan, step: int) -> float:
    """Share of the full rate: linear warm-up, constant, linear decay to 0."""
    rise = min(1.0, (step + 1) / plan.warmup)
    fall = min(1.0, (plan.steps - step) / (plan.decay * plan.steps))
    return rise * fall


def optimizers(model, plan: Plan):
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    held = dict.fromkeys(id(p) for p in matrices)
    rest = [p for p in model.parameters() if id(p) not in held]
    muon = torch.optim.Muon(matrices, lr=plan.rate, momentum=0.95, weight_decay=plan.weight_decay)
    adam = torch.optim.AdamW(rest, lr=plan.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return {muon: plan.rate, adam: plan.adam_rate}


def loss_of(model, batch, dtype=torch.bfloat16):
    """Weighted mean of the token losses."""
    ids, labels, weights, position, mask = batch
    keep = weights.reshape(-1) > 0
    model.config._attn_implementation = "lab_packed"
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state
        model.config._attn_implementation = "sdpa"
        logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[keep])
    weights = weights.reshape(-1)[keep]
    losses = F.cross_entropy(logits.float(), labels.reshape(-1)[keep], reduction="none")
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def evaluate(model, tokenizer, names, n: int = 100, seed: int = 0, temperature: float = 0.0) -> dict[str, float]:
    """Greedy exact match on held-out items (for nll skills: nats a token of the answer)."""
    model.eval()
    torch.manual_seed(seed)
    out = {}
    for name in names:
        skill = skills()[name]
        items = skill.items("test", n)
        if skill.metric == "nll":
            out[name] = answer_nll(model, tokenizer, items)
            continue
        right = 0
        for start in range(0, len(items), 256):
            part = items[start : start + 256]
            enc = tokenizer([i.prompt for i in part], return_tensors="pt", padding=True, padding_side="left")
            longest = max(len(tokenizer(i.answer)["input_ids"]) for i in part) + 12
            how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
            ids = model.generate(
                input_ids=enc["input_ids"], attention_mask=enc["attention_mask"], max_new_tokens=longest,
                eos_token_id=[1, 6], pad_token_id=2, **how,
            )  # fmt: skip
            new = ids[:, enc["input_ids"].shape[1] :].tolist()
            for item, row in zip(part, new, strict=True):
                stop = next((k for k, t in enumerate(row) if t in (1, 6)), None)
                right += stop is not None and skill.check(item, tokenizer.decode(row[:stop]))
        out[name] = right / len(items)
    model.train()
    return out


@torch.no_grad()
def answer_nll(model, tokenizer, items) -> float:
    total, count = 0.0, 0
    for item in items:
        head = tokenizer(item.prompt)["input_ids"]
        tail = tokenizer(item.answer, add_special_tokens=False)["input_ids"] + [1]
        ids = torch.tensor([head + tail])
        logp = model(input_ids=ids).logits[0].float().log_softmax(-1)
        picked = logp[len(head) - 1 : -1].gather(1, ids[0, len(head) :, None])
        total, count = total - picked.sum().item(), count + len(tail)
    return total / count


def train(
    name: str, plan: Plan, work: Path, resume: bool = False, eval_every: int = 250, eval_n: int = 60, stop_at: int | None = None
):
    from transformers import AutoTokenizer, LlamaForCausalLM

    work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(LAB / "tokenizer")
    if plan.start:
        model = LlamaForCausalLM.from_pretrained(LAB / plan.start, dtype=torch.float32)
        if model.config.num_hidden_layers != plan.layers:
            model = grow(model, plan)
    else:
        model = new_model(plan, len(tokenizer))
    opts, begin, spent = optimizers(model, plan), 0, 0.0
    state_file = work / "state.pt"
    if resume and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, kept in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(kept)
        begin, spent = state["step"], state["seconds"]
    rows, names = Rows(plan, tokenizer, store=work.parent / "text.json"), [n for n in plan.mixture if plan.mixture[n] > 0]
    model.train()
    clock, seen = time.time() - spent, 0
    averaged = 0.0
    for step in range(begin, stop_at or plan.steps):
        for opt, top in opts.items():
            for group in opt.param_groups:
                group["lr"] = top * rate_at(plan, step)
        batch = rows.step(step)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seen += int((batch[3] >= 0).sum())
        averaged = loss.item() if step == begin else 0.95 * averaged + 0.05 * loss.item()
        done = step + 1
        if done % 50 == 0:
            log.info(
                "%s step %d loss %.4f  %.0f s  %.0f tokens/s",
                name,
                done,
                averaged,
                time.time() - clock,
                seen / (time.time() - clock - spent),
            )
        if done in plan.keep:
            save(model, work / "versions" / plan.keep[done])
        if done % eval_every == 0 or done == plan.steps:
            paused = time.time()
            log.info(
                "%s step %d %s",
                name,
                done,
                json.dumps({k: round(v, 3) for k, v in evaluate(model, tokenizer, names, eval_n).items()}),
            )
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "step": done,
                        "seconds": paused - clock}, state_file)  # fmt: skip
            save(model, work / "model")
            clock += time.time() - paused
    save(model, work / "model")
    (work / "plan.json").write_text(json.dumps({**asdict(plan), "seconds": time.time() - clock}, indent=1))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["tokenizer", *PLANS])
    parser.add_argument("--work", type=Path, default=Path("runs/bases"), help="where states and results are written")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    if args.what == "tokenizer":
        from .lab_tokenizer import train_tokenizer

        train_tokenizer(LAB / "tokenizer")
        return
    train(args.what, PLANS[args.what], args.work / args.what, args.resume)


if __name__ == "__main__":
    main()
