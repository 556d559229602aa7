"""The whole model at tiny size: losses equal their definitions, padding and caching change nothing, clear errors."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.flow_matching import euler_integrate, euler_times
from stereovla.modeling_stereovla.objectives import LanguageObjective, Predictions, Targets

POSE = 8  # seven pose tokens and EOS


def make_inputs(config, batch=2, words=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bins = torch.arange(config.action_vocab_size - config.num_bins, config.action_vocab_size - 1)
    state_ids = bins[torch.randint(len(bins), (batch, 7 * config.state_history), generator=generator)]
    text = torch.randint(10, 400, (batch, words), generator=generator)
    start = torch.full((batch, 1), config.text_config.bos_token_id)
    image = torch.full((batch, config.num_visual_tokens), config.image_token_id)
    ids = torch.cat([start, image, text, state_ids], dim=1)
    size = config.image_size
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.rand(batch, 2, 3, size, size, generator=generator),
        "state": torch.randn(batch, config.state_history, config.state_dim, generator=generator),
    }


def make_training_inputs(config, batch=4, seed=0):
    inputs = make_inputs(config, batch, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    low = config.action_vocab_size - config.num_bins
    pose = torch.randint(low, config.action_vocab_size, (batch, 7), generator=generator)
    answer = torch.cat([pose, torch.full((batch, 1), config.text_config.eos_token_id)], dim=1)
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    labels = ids.clone()
    labels[:, : -POSE - 7] = -100
    return inputs | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "actions": torch.randn(batch, config.chunk_size, config.action_dim, generator=generator),
        "is_action": torch.tensor([True, False] * (batch // 2)),
    }


LEARNED = ("pointing", "naming", "disparity", "keyframe", "language_pointing")  # where a config says so
LOSSES = [f"{name}_loss" for name in ("action", "language", *LEARNED)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny")).eval()


@torch.no_grad()
def test_losses_equal_their_definitions(model):
    config = model.config
    inputs = make_training_inputs(config)
    noise = torch.randn(4, 1, config.chunk_size, config.action_dim)
    time = torch.tensor([[0.2], [0.5], [0.9], [0.5]])
    output = model(**inputs, noise=noise, time=time)
    # language: one mean over all labelled tokens of the batch, from the logits of a plain forward
    plain = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    logits = model(**plain).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.language_loss, expected, atol=1e-5, rtol=1e-5)
    # flow: the action samples' mean squared error to noise - action
    target = (noise[:, 0] - inputs["actions"])[inputs["is_action"]]
    torch.testing.assert_close(output.action_loss, (output.velocity[:, 0] - target).square().mean())
    torch.testing.assert_close(output.loss, output.language_loss + output.action_loss)
    assert torch.isnan(output.sample_action_loss).tolist() == [False, True, False, True]
    torch.testing.assert_close(output.sample_language_loss.mean(), output.language_loss, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chain_of_thought", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, chain_of_thought, side):
    inputs = make_inputs(model.config, batch=1)
    noise = torch.randn(1, model.config.chunk_size, model.config.action_dim)
    alone = model.predict_action(**inputs, noise=noise, chain_of_thought=chain_of_thought)
    pad = torch.full((1, 5), model.config.text_config.pad_token_id)
    zeros = torch.zeros(1, 5, dtype=torch.long)
    order = (lambda a, b: [a, b]) if side == "left" else (lambda a, b: [b, a])
    padded = inputs | {
        "input_ids": torch.cat(order(pad, inputs["input_ids"]), 1),
        "attention_mask": torch.cat(order(zeros, inputs["attention_mask"]), 1),
    }
    together = model.predict_action(**padded, noise=noise, chain_of_thought=chain_of_thought)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_chain_of_thought_equals_decoding_without_a_cache(model):
    config, inputs = model.config, make_inputs(model.config)
    noise = torch.randn(2, config.chunk_size, config.action_dim)
    fast = model.predict_action(**inputs, noise=noise, chain_of_thought=True, num_steps=3)
    ids = inputs["input_ids"]
    for _ in range(POSE):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)

    def velocity(x, step):
        time = euler_times(3)[step].expand(len(x))
        return model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            state=inputs["state"],
            actions=torch.zeros_like(x),
            noise=x[:, None] / time[0],
            time=time[:, None],
        ).velocity[:, 0]

    slow = euler_integrate(velocity, noise, 3)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_generate_reads_the_images_once_and_equals_plain_decoding(model):
    inputs = make_inputs(model.config)
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = inputs["input_ids"]
    for _ in range(5):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, ids)


@torch.no_grad()
def test_actions_depend_on_everything_they_should(model):
    inputs = make_inputs(model.config, batch=1)
    noise = torch.randn(1, model.config.chunk_size, model.config.action_dim)
    base = model.predict_action(**inputs, noise=noise)
    assert torch.equal(base, model.predict_action(**inputs, noise=noise))
    swapped = inputs["pixel_values"].flip(1)
    right_only = inputs["pixel_values"].clone()
    right_only[:, 1] = torch.rand_like(right_only[:, 1])
    other_words = inputs["input_ids"].clone()
    other_words[:, 1 + model.config.num_visual_tokens] += 1
    for change in (
        {"pixel_values": swapped},
        {"pixel_values": right_only},
        {"input_ids": other_words},
        {"state": inputs["state"] + 1},
    ):
        assert not torch.allclose(base, model.predict_action(**(inputs | change), noise=noise), atol=1e-6), (
            change.keys()
        )


def test_hidden_pose_tokens_do_not_reach_the_expert():
    """With direct_probability 1, the action loss is the same whatever the pose tokens say."""
    torch.manual_seed(0)
    model = StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny", direct_probability=1.0)).eval()
    inputs = make_training_inputs(model.config)
    changed = inputs["input_ids"].clone()
    changed[:, -POSE:-1] = model.config.action_vocab_size - 5
    fixed = {"noise": torch.randn(4, 1, model.config.chunk_size, 7), "time": torch.rand(4, 1)}
    with torch.no_grad():
        first = model(**inputs, **fixed).action_loss
        second = model(**(inputs | {"input_ids": changed}), **fixed).action_loss
        # and it is the loss of the sequence that ends before them
        cut = {key: inputs[key][:, :-POSE] for key in ("input_ids", "attention_mask")}
        model.config.direct_probability = 0.0
        third = model(**(inputs | cut | {"labels": None}), **fixed).action_loss
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, third, atol=1e-6, rtol=1e-5)


def test_every_parameter_gets_a_gradient_from_the_mixture():
    torch.manual_seed(0)
    config = StereoVLAConfig.from_preset(
        "tiny",
        use_pointers=True,
        pointing_loss_weight=1.0,
        disparity_loss_weight=1.0,
        keyframe_loss_weight=1.0,
        flow_draws=2,
    )
    model = StereoVLAForActionPrediction(config)
    size = config.image_size
    output = model(
        **make_training_inputs(config),
        disparity=torch.rand(4, size, size) * 20 + 1,
        points=torch.rand(4, 2, 2) * size,
        displacement=torch.rand(4, config.pose_dim),
    )
    output.loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


def test_parts_of_a_batch_add_up_to_the_batch():
    """With the whole batch's counts, as split over processes or accumulation steps; samples are unevenly spread."""
    torch.manual_seed(0)
    weights = {f"{name}_loss_weight": 1.0 for name in LEARNED}
    options = {"use_pointers": True, "language_pointing_layer": 1, "bin_smoothing": 1.0}
    config = StereoVLAConfig.from_preset("tiny", **options, flow_draws=2, direct_probability=0.5, **weights)
    model = StereoVLAForActionPrediction(config).eval()  # batch norm would see another batch
    size, chunk = config.image_size, (config.chunk_size, config.action_dim)
    batch = make_training_inputs(config) | {
        "disparity": torch.rand(4, size, size) * 20 + 1,
        "points": torch.rand(4, 2, 2) * size,
        "names": torch.randint(5, 20, (4, 3, 2)),
        "name_points": torch.rand(4, 3, 2) * size * 1.2,  # some lie outside
        "displacement": torch.rand(4, config.pose_dim),
        "is_action": torch.tensor([True, True, False, True]),
        "noise": torch.randn(4, 2, *chunk),
        "time": torch.rand(4, 2),
        "hide_pose": torch.tensor([True, False, False, True]),
    }
    batch["labels"][0] = -100
    anywhere = torch.rand(*batch["labels"].shape, 2) * size
    batch["answer_points"] = torch.where(batch["labels"][..., None] == -100, float("nan"), anywhere)
    batch["disparity"][1], batch["points"][2], batch["displacement"][3] = 0, float("nan"), float("nan")
    found = []
    for parts in ([slice(0, 4)], [slice(0, 3), slice(3, 4)]):
        model.zero_grad()
        counts = None if len(parts) == 1 else model.loss_counts(**batch)
        outputs = [model(**{name: value[part] for name, value in batch.items()}, counts=counts) for part in parts]
        losses = torch.stack([torch.stack([output[name] for name in LOSSES]) for output in outputs]).sum(0)
        sum(output.loss for output in outputs).backward()
        found.append((losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (together, gradients), (apart, summed) = found
    assert (together > 0).all()
    torch.testing.assert_close(apart, together, atol=1e-6, rtol=1e-5)
    assert gradients.keys() == summed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, atol=1e-5, rtol=1e-3)


def test_smoothed_bins_by_brute_force():
    """A bin's target is a Gaussian over all bins, cut off at their ends, and hundredths' one over all hundredths; other
    tokens keep theirs.
    """
    config = StereoVLAConfig.from_preset("tiny", bin_smoothing=2.0, num_hundredths=100)
    first, objective = config.action_vocab_size - config.num_bins, LanguageObjective(config)
    labels = torch.tensor(
        [[7, first + 100, 42, first, config.action_vocab_size - 1, first - 1, first - 53, first - 101]]
    )
    logits = torch.randn(7, config.text_config.vocab_size, generator=torch.Generator().manual_seed(0))
    expected = []
    for values, label in zip(logits, labels[0, 1:].tolist(), strict=True):
        log_p = values.log_softmax(-1)
        if label < first - 100:
            expected.append(-log_p[label])
            continue
        wanted = torch.zeros(config.text_config.vocab_size)
        for other in range(first, config.action_vocab_size) if label >= first else range(first - 100, first):
            wanted[other] = math.exp(-(((other - label) / 2.0) ** 2) / 2)
        wanted /= wanted.sum()
        expected.append(F.kl_div(log_p, wanted, reduction="sum"))
    found = objective.outputs(Predictions(logits=logits), Targets(labels=labels), 7)
    torch.testing.assert_close(found["language_loss"], torch.stack(expected).mean())
    # the least loss is 0, where the prediction is that Gaussian
    places = torch.arange(config.text_config.vocab_size) - first
    best = torch.where((places >= 0) & (places < config.num_bins), -0.5 * ((places - 100) / 2.0) ** 2, -1e4)
    found = objective.outputs(Predictions(logits=best[None]), Targets(labels=labels[:, :2]), 1)
    torch.testing.assert_close(found["language_loss"], torch.tensor(0.0), atol=1e-5, rtol=0)
    # without the option it is the cross-entropy
    plain = LanguageObjective(StereoVLAConfig.from_preset("tiny"))
    found = plain.outputs(Predictions(logits=logits), Targets(labels=labels), 7)
    torch.testing.assert_close(found["language_loss"], F.cross_entropy(logits, labels[0, 1:]))


@torch.no_grad()
def test_bad_input_is_refused(model):
    inputs = make_inputs(model.config)
    with pytest.raises(ValueError, match=r"pixel_values has shape \(2, 1, 3, 64, 64\)"):
        model.predict_action(**(inputs | {"pixel_values": inputs["pixel_values"][:, :1]}))
    with pytest.raises(ValueError, match=r"state has shape \(2, 4, 6\)"):
        model.predict_action(**(inputs | {"state": inputs["state"][..., :6]}))
    with pytest.raises(ValueError, match="image tokens"):
        model.predict_action(**(inputs | {"input_ids": inputs["input_ids"].clone().fill_(5)}))
    with pytest.raises(ValueError, match="noise has shape"):
        model.predict_action(**inputs, noise=torch.zeros(1, 1, 1))
    with pytest.raises(TypeError, match="labels"):
        model.predict_action(**inputs, labels=inputs["input_ids"])


def test_config_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="did you mean 'chunk_size'"):
        StereoVLAConfig.from_preset("tiny", chunk_sise=3)
    with pytest.raises(ValueError, match="tiny, demo, points, lab, full"):
        StereoVLAConfig.from_preset("huge")
    with pytest.raises(Exception, match="image_size is 100"):
        StereoVLAConfig.from_preset("tiny", image_size=100)
    with pytest.raises(Exception, match="'float32' or 'model'"):
        StereoVLAConfig.from_preset("tiny", time_embedding_dtype="float64")


def test_config_survives_saving(tmp_path):
    for preset in ("tiny", "demo", "lab"):
        config = StereoVLAConfig.from_preset(preset)
        config.save_pretrained(tmp_path / preset)
        again = StereoVLAConfig.from_pretrained(tmp_path / preset)
        assert again.to_dict() | {"transformers_version": 0} == config.to_dict() | {"transformers_version": 0}


FRESH = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
folder = sys.argv[1]
# copied, as memory that begins elsewhere is summed in another order
inputs = {name: tensor.clone() for name, tensor in load_file(folder + "/inputs.safetensors").items()}
expected = inputs.pop("expected")
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
print(float((model.predict_action(**inputs) - expected).abs().max()))
"""


def test_saved_model_gives_the_same_actions_in_a_fresh_process(model, fresh, tmp_path):
    """Loaded by remote code, in another folder, without this repository on the path (-I)."""
    from safetensors.torch import save_file

    inputs = make_inputs(model.config)
    inputs["noise"] = torch.randn(2, model.config.chunk_size, model.config.action_dim)
    model.save_pretrained(tmp_path / "model")
    assert "AutoModel" in json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    save_file(inputs | {"expected": model.predict_action(**inputs)}, tmp_path / "model" / "inputs.safetensors")
    run = fresh.run(FRESH, str(tmp_path / "model"))
    assert float(run.stdout.splitlines()[-1]) == 0
