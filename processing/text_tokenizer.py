"""A small tokenizer for models that are trained from scratch. Checkpoints carry the result; this file does not ship."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .answers import IN_OUT, NEWLINE, action_prompt, box_prompt, camera_prompt, depth_prompt

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]  # ids 0, 1, 2, 3; <s> and </s> as in InternLM2
MAX_IMAGE_SIZE = 1000  # px
HUNDREDTHS = [f".{number:02d}" for number in range(100)]


def build_tokenizer(
    texts: Iterable[str],
    num_bins: int = 256,
    model_max_length: int = 1024,
    images_first: bool = False,
    image_size: int = 100,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer whose words are whole tokens, and which can still write any other text.

    `texts` are the instructions and object names of the data; they are put into the prompts before the merges are
    learned. Every word of theirs becomes one token, as do the pixels 0 to `image_size` - 1 of a side and two decimals
    with their point: a small model does not put a number together from digits. Unknown words fall apart into bytes. The
    last `num_bins` ids are reserved for bins (see `answers.BinTokens`), before them are `HUNDREDTHS`. The same texts
    give the same tokenizer, in any order. `images_first`: the prompts are those of a DepthVLA, which begin with the
    instruction itself, so that a word is whole without a space before it too; see `prompt_tokens.PromptTokens`.
    """
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"image_size is {image_size}; it must be 1 to {MAX_IMAGE_SIZE} px")
    unique = sorted(set(texts))
    if not unique or not all(text.strip() for text in unique):
        raise ValueError(f"texts must hold at least one text and no empty one, got {unique[:3]}")
    form = NEWLINE if images_first else IN_OUT
    corpus = [prompt(text, form) for text in unique for prompt in (action_prompt, box_prompt)]
    corpus += [NEWLINE.format(text) for text in unique] if images_first else []
    corpus += [depth_prompt([[16, 21]], form), camera_prompt(form), "f [1] c [1] b [1] t [-1] q [-1]"]
    corpus += [str(number) for number in range(image_size)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1_000_000,  # no limit: merging ends when every word is one token
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in HUNDREDTHS])
    tokenizer.add_special_tokens([AddedToken(f"<bin_{num_bins - i}>", special=True) for i in range(num_bins)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>"],
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
