"""A small tokenizer of PaliGemma's kind: transformers' class, special tokens, places, image token, and few merges."""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, models, normalizers, trainers
from transformers import GemmaTokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]  # ids 0 ... 4, as in Gemma


def gemma_tokenizer(texts: Iterable[str], merges: int = 60) -> GemmaTokenizer:
    """BPE of bytes and pieces learned from `texts`, "\\n" a piece of its own; then <loc0000> ... <loc1023>,
    <seg000> ... <seg127> and <image>, as in PaliGemma.
    """
    learned = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learned.normalizer = normalizers.Replace(" ", "▁")
    letters = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    tokens = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(tokens) + len(letters) + merges,
        special_tokens=tokens,
        initial_alphabet=letters,
        show_progress=False,
    )
    learned.train_from_iterator(sorted(set(texts)), trainer)
    model = json.loads(learned.to_str())["model"]
    tokenizer = GemmaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.add_tokens([f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)])
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<image>", normalized=False, special=True)]})
    return tokenizer
