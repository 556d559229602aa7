"""Texts and numbers as one padded batch of ids: image placeholders, reserved ids, length limit, labels."""

from typing import Any

import numpy as np

from .answers import IN_OUT, NEWLINE, BinTokens

IGNORE_INDEX = -100
# Instructions repeat; tokenizing them again and again was a quarter of the time of a training batch.
_REMEMBERED_TEXTS = 2048
_REMEMBERED_CHARACTERS = 256  # of one; longer ones would hold hundreds of MB, if somebody wants them to
MAX_TEXT_CHARACTERS = 8192  # refused before it is tokenized; a thousand tokens have half as many


class PromptTokens:
    """A tokenizer together with the ids that only the processor may write: special tokens, image token and bins.

    Two layouts: the released StereoVLA's, BOS, image tokens, "In: question\\nOut: "; and with `images_first` that of
    PaliGemma and pi0 (transformers' models/pi0/processing_pi0.py), the image tokens of every view, BOS,
    "question\\n". `form` is how `answers` puts a question for it.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_token: str,
        num_visual_tokens: int,
        num_bins: int,
        action_vocab_size: int | None,
        max_length: int | None,
        images_first: bool = False,
    ):
        """Options as in `PolicyProcessor`. ValueError if a special token is missing or shares its id with a bin."""
        self.tokenizer = tokenizer
        self.bins = BinTokens(num_bins, len(tokenizer) if action_vocab_size is None else action_vocab_size)
        self.num_visual_tokens = num_visual_tokens
        self.images_first = images_first
        self.form = NEWLINE if images_first else IN_OUT
        self.max_length = tokenizer.model_max_length if max_length is None else max_length
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no token {image_token!r}; add it with "
                f"tokenizer.add_special_tokens({{'extra_special_tokens': [{image_token!r}]}})"
            )
        special = {"image": self.image_token_id}
        special |= {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        for name, token_id in special.items():
            if token_id is None:
                raise ValueError(f"the tokenizer has no {name} token")
            if self.bins.is_bin(token_id):
                raise ValueError(
                    f"the {name} token has id {token_id}, which is also a bin: with num_bins={num_bins} and "
                    f"action_vocab_size={self.bins.vocab_size} the bins are {self.bins.first_id} ... "
                    f"{self.bins.vocab_size - 1}; set action_vocab_size to the size without appended special tokens"
                )
        bins = range(self.bins.first_id, self.bins.vocab_size)
        self._seen: dict[str, list[int]] = {}
        self._reserved = frozenset([*special.values(), *tokenizer.all_special_ids, *bins])

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Texts -> ids without special tokens; ValueError if a text spells out a reserved token, or is longer than
        MAX_TEXT_CHARACTERS.
        """
        longest = max(map(len, texts), default=0)
        if longest > MAX_TEXT_CHARACTERS:
            raise ValueError(f"a text has {longest:,} characters, at most {MAX_TEXT_CHARACTERS:,} are read")
        known = {text: self._seen[text] for text in texts if text in self._seen}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        for text, ids in zip(
            new, self.tokenizer(new, add_special_tokens=False)["input_ids"] if new else [], strict=True
        ):
            if not self._reserved.isdisjoint(ids):
                token = self.tokenizer.convert_ids_to_tokens(next(i for i in ids if i in self._reserved))
                raise ValueError(f"the text {text!r} contains the reserved token {token!r}")
            known[text] = ids
        short = {text: ids for text, ids in known.items() if len(text) <= _REMEMBERED_CHARACTERS}
        self._seen = short if len(self._seen) > _REMEMBERED_TEXTS else self._seen | short
        return [known[text] for text in texts]

    def places_of(self, part: str, text: str) -> slice:
        """Which of the ids of `text` write its first `part`: where they differ from those with another word there."""
        if part not in text:
            raise ValueError(f"{part!r} is not in {text!r}")
        ids, others = self.encode([text, text.replace(part, "#", 1)])
        shorter = min(len(ids), len(others))
        begin = next((n for n in range(shorter) if ids[n] != others[n]), shorter)
        end = next((n for n in range(shorter - begin) if ids[-1 - n] != others[-1 - n]), shorter - begin)
        return slice(begin, len(ids) - end)

    @property
    def start(self) -> list[int]:
        """Ids before every text, of one set of image placeholders."""
        return self.start_of(1)

    def start_of(self, views: int) -> list[int]:
        """Ids before a text: BOS and the image placeholders of so many `views`, in the order of the layout."""
        images, bos = [self.image_token_id] * (self.num_visual_tokens * views), [self.tokenizer.bos_token_id]
        return images + bos if self.images_first else bos + images

    def pad(self, sequences: list[tuple[list[int], int, int]], side: str) -> dict[str, np.ndarray]:
        """Per sample (ids, index of the first supervised id, number of ids to be generated) -> one padded batch.

        input_ids, attention_mask and labels, int64 (B, longest). Nothing is cut: a sequence over max_length is an
        error.
        """
        if side not in ("left", "right"):
            raise ValueError(f"padding_side={side!r} is unknown; valid sides: ['left', 'right']")
        for number, (ids, _, room) in enumerate(sequences):
            if len(ids) + room > self.max_length:
                visual = ids.count(self.image_token_id)
                raise ValueError(
                    f"sample {number} has {len(ids) + room} tokens ({visual} of them visual, {room} "
                    f"for the answer), the limit is {self.max_length}; shorten its text or raise max_length"
                )
        length = max(len(ids) for ids, _, _ in sequences)
        input_ids = np.full((len(sequences), length), self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask, labels = np.zeros_like(input_ids), np.full_like(input_ids, IGNORE_INDEX)
        for row, (ids, first, _) in enumerate(sequences):
            begin = length - len(ids) if side == "left" else 0
            input_ids[row, begin : begin + len(ids)] = ids
            attention_mask[row, begin : begin + len(ids)] = 1
            labels[row, begin + first : begin + len(ids)] = ids[first:]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
