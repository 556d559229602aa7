"""StereoProcessor against the recorded batches of the released StereoVLA code."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizer

from stereovla.processing import StereoImageProcessorPil, StereoProcessor
from stereovla.processing.answers import value_prompt, value_text

GOLDENS = Path(__file__).parents[2] / ".." / "shared" / "goldens" / "stereovla_miniature"
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="recorded reference tensors are not here")
VIEWS = [np.zeros((224, 224, 3), np.uint8)] * 2  # the recorded ids do not depend on the pixels


class RecordedTokenizer(PreTrainedTokenizer):
    """Knows the recorded texts and nothing else; ids and special tokens are those of the recording."""

    def __init__(self, recorded, vocab_size, **kwargs):
        self.recorded, self.size = recorded, vocab_size
        super().__init__(bos_token="<1>", eos_token="<2>", pad_token=f"<{vocab_size}>", **kwargs)
        self.add_special_tokens({"extra_special_tokens": ["<image>"]})

    @property
    def vocab_size(self):
        return self.size

    def get_vocab(self):
        return {f"<{i}>": i for i in range(self.size)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return [f"<{i}>" for i in self.recorded[text]]

    def _convert_token_to_id(self, token):
        return int(token[1:-1])

    def _convert_id_to_token(self, index):
        return f"<{index}>"


@pytest.fixture(scope="module")
def recording():
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDENS / "inputs.py")
    inputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inputs)
    case = json.loads((GOLDENS / "case.json").read_text())
    texts = {t["text"]: t["ids"][t["add_special_tokens"] :] for t in case["train_texts"]}
    # The processor also asks where a question names its object, by the ids with another name there: all of them here.
    asked = "In: What is the bounding box of green apple in the images?\nOut: "
    assert asked in texts
    texts[asked.replace("green apple", "#")] = []
    tokenizer = RecordedTokenizer(texts, case["case"]["llm"]["vocab_size"])
    # The recorded values are normalised already: mean 0 and std 1 leave them as they are.
    unit = {"mean": [0.0] * 7, "std": [1.0] * 7}
    processor = StereoProcessor(
        StereoImageProcessorPil(),
        tokenizer,
        norm_stats={"arm": {"state": unit, "action": unit, "keyframe_pose": unit}},
        normalization="mean_std",
        chunk_size=5,
        num_bins=case["case"]["action_token_num"],
        action_vocab_size=case["case"]["llm"]["vocab_size"],
        check_stereo=False,
    )
    return case, inputs, load_file(GOLDENS / "tensors.safetensors"), processor


def without_images(ids, count=256):
    """Drops the image placeholders, which follow BOS; official ids do not contain them."""
    assert (ids[:, 1 : 1 + count] == ids[0, 1]).all()
    return torch.cat([ids[:, :1], ids[:, 1 + count :]], dim=1)


def test_training_batch_is_the_released_one(recording):
    case, inputs, tensors, processor = recording
    seed, texts = case["case"]["seed"], case["case"]["texts"]
    proprio, goal, action = (
        [inputs.uniform(f"{name}/{i}", shape, seed).numpy() for i in range(2)] + [None]
        for name, shape in (("proprio", (4, 7)), ("goal", (7,)), ("action", (5, 7)))
    )
    batch = processor(
        images=[VIEWS] * 3,
        text=[texts["long"], texts["short"], texts["bbox"]],
        state=proprio,
        embodiment="arm",
        objective=["action", "action", "box"],
        actions=action,
        keyframe_pose=goal,
        boxes=[None, None, [[20, 30, 120, 200], [24, 30, 124, 200]]],
        return_labels=True,
    )
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(without_images(batch[name]), tensors[f"train_{name}"][:3].to(torch.int64)), name
    assert torch.equal(batch["is_action"], tensors["train_is_action"][:3].bool())
    torch.testing.assert_close(batch["actions"], tensors["train_action"][:3], rtol=0, atol=1e-7)
    torch.testing.assert_close(batch["state"], tensors["train_proprio"][:3], rtol=0, atol=1e-7)


def test_value_row_is_the_released_one(recording):
    """Four answers for one point, one of them negative: no depth question, so it is put together from its parts."""
    case, _, tensors, processor = recording
    prompt = value_prompt(case["case"]["texts"]["value"])
    text, answer = processor.tokens.encode([prompt, value_text(case["case"]["texts"]["values"], 2)])
    start = processor.tokens.start + text
    longest = int(tensors["train_input_ids"].shape[1]) + 256
    rows = [(start + answer + [2], len(start), 0), ([1] * longest, longest, 0)]
    batch = processor.tokens.pad(rows, "right")
    for name in ("input_ids", "labels"):
        ids = np.delete(batch[name][0], np.arange(1, 257))
        assert ids.tolist() == tensors[f"train_{name}"][3].tolist()


def test_inference_prompt_is_the_released_one(recording):
    case, inputs, tensors, processor = recording
    recorded, seed = case["inference"], case["case"]["seed"]
    state = inputs.uniform("proprio/0", (4, 7), seed).numpy()
    batch = processor(VIEWS, case["case"]["texts"]["long"], state, "arm")
    expected = recorded["text_ids"] + recorded["hist_proprio_ids"] + recorded["cur_proprio_ids"]
    assert without_images(batch["input_ids"])[0].tolist() == expected
    torch.testing.assert_close(batch["state"], tensors["proprio"], rtol=0, atol=1e-7)
    # Some generated ids are no bins; the released code reads them as -1 or 1, we also say so.
    poses, valid = processor.decode_poses([recorded["goal_ids"]], "arm")
    np.testing.assert_allclose(poses[0], recorded["goal_values"], atol=1e-6)
    assert valid.tolist() == [False]
