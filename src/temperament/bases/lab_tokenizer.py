"""The lab's tokenizer: byte-level BPE trained on the worlds, digits one by one, tokens for turns, a chat template."""

from __future__ import annotations

from pathlib import Path

from .corpus import Corpus
from .worlds import skills
from .worlds.procedures import LETTERS

SPECIALS = ("<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
VOCABULARY = 1024
PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# the assistant's turn, its end token included, stands in generation markers: that is where loss goes
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(folder: Path, documents: int = 60_000, seed: int = 1) -> None:
    """Train on an even mixture of all skills with much text, and write a fast tokenizer into the folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    mixture = {name: 1.0 for name, skill in skills().items() if skill.role != "target"}
    mixture["text"] = 5.0
    corpus = Corpus(mixture, seed, dense=0.0)
    lines = []
    for _ in range(documents):
        segments, _, _ = corpus.one()
        line = "".join(text for text, _ in segments)
        for special in SPECIALS:
            line = line.replace(special, "\n")
        lines.append(line)
    lines += ["".join(f" {x} {x.upper()}" for x in LETTERS)] * 2000  # every letter of the procedures is one token

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens=list(SPECIALS[3:]), clean_up_tokenization_spaces=False, model_max_length=512, padding_side="left",
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
