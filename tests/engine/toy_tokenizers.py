"""Small real tokenizers, trained here, and chat templates in the styles that are around."""

import json
import random
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCE = "the answer is a number of letters two plus three makes five what who why please say hello world I think so yes no"
WORDS = SENTENCE.split()
TURNS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", *TURNS, "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"]
ASCII = [chr(c) for c in range(33, 127)]


def corpus(n=400):
    r = random.Random(0)
    for _ in range(n):
        yield " ".join(r.choices(WORDS, k=12)) + f" {r.randint(0, 99)}.\n\nuser assistant system model [INST] [/INST] <think>\n"


@lru_cache
def tokenizer(kind="bpe", bos=True, pad="<pad>", trim=True):
    """kind: bpe (byte-level, as GPT and Llama 3), unigram (Metaspace and byte fallback, as Llama 2), wordpiece (as BERT)."""
    options = dict(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    if kind == "bpe":
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "unigram":
        tok = Tokenizer(models.Unigram())
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.UnigramTrainer(unk_token="<unk>", initial_alphabet=ASCII, **options)
    else:
        tok = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tok.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
        tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tok.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(initial_alphabet=ASCII, **options)
    tok.train_from_iterator(corpus(), trainer)
    if kind == "unigram":  # pieces for single bytes, as SentencePiece adds them
        vocab = [tuple(piece) for piece in json.loads(tok.to_str())["model"]["vocab"]]
        tok.model = models.Unigram(vocab + [(f"<0x{i:02X}>", -20.0) for i in range(256)], tok.token_to_id("<unk>"), True)
    if bos:
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))])
        byte_level = [processors.ByteLevel(trim_offsets=trim)] if kind == "bpe" else []
        tok.post_processor = processors.Sequence([*byte_level, template])
    elif kind == "bpe":
        tok.post_processor = processors.ByteLevel(trim_offsets=trim)
    named = dict(bos_token="<s>" if bos else None, eos_token="</s>", unk_token="<unk>", pad_token=pad)
    return PreTrainedTokenizerFast(tokenizer_object=tok, **named)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (  # ends a turn with one token and the text with another
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MARKED = (  # the end token inside the marks
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_SHORT = MARKED.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}<|im_end|>")
FORGETS_THINKING = (  # as Qwen3 and R1: what was thought is dropped from all turns but the last
    "{% for message in messages %}{% set content = message['content'] %}{% if not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALWAYS_THINKS = (  # its generation prompt is not how it writes answers
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
NO_END = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}" \
         "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"  # fmt: skip
DOUBLE_BOS = "{{ bos_token }}" + LLAMA3
# name: (template, what the template puts before and after the words of an answer)
STYLES = {
    "chatml": (CHATML, "", "<|im_end|>"),
    "llama3": (LLAMA3, "", "<|eot_id|>"),
    "llama2": (LLAMA2, " ", " </s>"),
    "gemma": (GEMMA, "", "<end_of_turn>"),
    "phi": (PHI, "", "<|end|>"),
    "marked": (MARKED, "", "<|im_end|>"),
    "marked_short": (MARKED_SHORT, "", "<|im_end|>"),
}
