"""Tokens a second of `engine.tokens.generate` beside transformers' own `generate`, in one run.

    python benchmarks/generation.py [--model FOLDER] [--rows 64] [--prompt 16] [--new 32] [--threads 2] [--rounds 5]

Random prompts, greedy and sampled, no early end. All are measured in turn; printed are the median, the best round, and the best
for each second of CPU time, which other work on the machine disturbs least. Without --model: a random Llama of 2 million
parameters (width 192, 4 layers, vocabulary 1024).
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from temperament.engine.session import how
from temperament.engine.tokens import Sampling, generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    for name, value in (("rows", 64), ("prompt", 16), ("new", 32), ("threads", 2), ("rounds", 5)):
        parser.add_argument("--" + name, type=int, default=value)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    if a.model:
        model = AutoModelForCausalLM.from_pretrained(a.model)
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0))
    model.eval()
    size = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {size / 1e6:.1f} M parameters; {a.rows} rows, prompt {a.prompt}, {a.new} new, "
          f"{a.threads} threads; {how(model)}")
    ids = torch.randint(3, model.config.vocab_size, (a.rows, a.prompt))
    uneven = [row[: a.prompt - i % (a.prompt // 2)] for i, row in enumerate(ids.tolist())]
    fixed = {"max_new": a.new, "min_new": a.new}
    theirs = {"max_new_tokens": a.new, "min_new_tokens": a.new, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    runs = {
        "temperament, greedy": lambda: generate(model, ids.tolist(), Sampling(**fixed)),
        "transformers, greedy": lambda: model.generate(ids, do_sample=False, **theirs),
        "temperament, sampled": lambda: generate(model, ids.tolist(), Sampling(**fixed, temperature=1.0)),
        "transformers, sampled": lambda: model.generate(ids, do_sample=True, top_k=0, **theirs),
        "temperament, sampled, uneven prompts": lambda: generate(model, uneven, Sampling(**fixed, temperature=1.0)),
        "temperament, 8 samples a prompt": lambda: generate(
            model, [row for row in ids[: -(-a.rows // 8)].tolist() for _ in range(8)][: a.rows],
            Sampling(**fixed, temperature=1.0)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    worked: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(a.rounds + 1):
        for name, run in runs.items():
            start, cpu = time.perf_counter(), time.process_time()
            run()
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                worked[name].append(time.process_time() - cpu)
    n = a.rows * a.new
    for name, s in seconds.items():
        cpu = n / min(worked[name])
        print(f"{name:38} {n / statistics.median(s):8.0f} tokens/s   best {n / min(s):8.0f}   per CPU second {cpu:8.0f}")


if __name__ == "__main__":
    main()
