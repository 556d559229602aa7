"""DepthVLA as a whole: chunks from the cache are those of the training pass, and what people expect of a transformers
model.
"""

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from test_modeling_stereovla import FRESH
from tiny_depthvla import ANSWER, MERGED, float64_throughout, prompts, tiny, training_batch
from torch.utils._python_dispatch import TorchDispatchMode

from stereovla.modeling_stereovla import DepthVLAForActionPrediction
from stereovla.modeling_stereovla.configuration_depthvla import stereo_encoder

PAIR = {"views": ["left", "wrist"]}
POINTING = {"use_pointers": True, "pointing_loss_weight": 1.0, "keyframe_loss_weight": 1.0}
VARIANTS = {
    "block": PAIR,
    "full": PAIR | {"mask": "full"},
    "no depth expert": PAIR | {"depth_expert": False},
    "stereo": PAIR | {"depth_config": stereo_encoder()},
    "depth shown": {"depth_config": {"input": "depth"}, "state_history": 2},
    "pointers": PAIR | POINTING,
    "pointers, full": POINTING | {"mask": "full"},
    "four cells in a token": PAIR | MERGED,
}


def some_noise(config, rows: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, config.chunk_size, config.action_dim, generator=generator, dtype=dtype)


# ---- denoising


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "side"),
    [*((variant, "left") for variant in VARIANTS), ("block", "right"), ("block", "none"), ("full", "none")],
)
def test_a_chunk_is_the_integral_of_the_training_pass_s_velocities(variant, side):
    model = tiny(**VARIANTS[variant])
    config, inputs = model.config, prompts(model.config, side)
    if config.depth_config is not None and config.depth_config.input == "depth":
        inputs["depth_map"] = training_batch(config, side)["depth_map"]
    x = noise = some_noise(config)
    steps = 3
    with float64_throughout():
        chunk = model.predict_action(**inputs, noise=noise, num_steps=steps)
        for step in range(steps):
            # the time that `predict_action` has, in float32; with actions of 0 the noisy ones are time * noise
            time = torch.tensor(1 - step / steps, dtype=torch.float32).double().expand(3, 1)
            given = {"actions": torch.zeros_like(x), "noise": (x / time[:, :, None])[:, None], "time": time}
            x = x - model(**inputs, **given).velocity[:, 0] / steps
    torch.testing.assert_close(chunk, x, atol=1e-11, rtol=1e-11)
    assert (chunk - noise).abs().max() > 0.1


class Recorder(TorchDispatchMode):
    """Names of the operations that run within, and their outputs."""

    def __init__(self):
        super().__init__()
        self.ran: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(self, operation, types, inputs=(), keywords=None):
        outputs = operation(*inputs, **(keywords or {}))
        self.ran.append((operation.overloadpacket.__name__, outputs))
        return outputs


def record_steps(model, inputs: dict, num_steps: int) -> tuple[Counter, list[Recorder], list[list[int]]]:
    """How often each part of the model ran in `predict_action`; the operations of each step, and where its buffers of
    keys and values were.
    """
    inner, expert, counts = model.model, model.action_expert, Counter()
    parts = {
        "vision": inner.vlm.vision_tower,
        "VLM": inner.vlm.language_model.layers[1].mlp,
        "VLM's positions": inner.vlm.language_model.rotary_emb,
        "depth encoder": inner.depth_expert.encoder,
        "depth decoder": inner.depth_expert.decoder.layers[1].mlp,
        "depth positions": inner.depth_expert.decoder.rotary_emb,
        "action expert": expert.transformer.layers[1].mlp,
        "action positions": expert.transformer.rotary_emb,
    }
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: counts.update([name]))
    recorders, places = [], []
    denoise = expert.denoise

    def recorded(prefix, *given):
        recorders.append(Recorder())
        with recorders[-1]:
            velocity = denoise(prefix, *given)
        places.append([state.data_ptr() for layer in prefix.cache.buffers.values() for state in layer])
        return velocity

    expert.denoise = recorded
    with torch.no_grad():
        model.predict_action(**inputs, noise=some_noise(model.config, dtype=torch.float32), num_steps=num_steps)
    return counts, recorders, places


@pytest.mark.parametrize("mask", ["block", "full"])
@pytest.mark.parametrize("side", ["left", "none"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_does_not_change_from_step_to_step_is_computed_once(mask, side, implementation):
    model = tiny(torch.float32, **PAIR, mask=mask)
    model.set_attn_implementation(implementation)
    counts, recorders, places = record_steps(model, prompts(model.config, side, torch.float32), num_steps=5)
    assert counts.pop("action expert") == 1 + 5  # the state tokens, and each step's chunk
    assert counts.pop("action positions") == 1
    assert len(counts) == 6 and set(counts.values()) == {1}
    assert len(places) == 5 and all(place == places[0] for place in places) and len(set(places[0])) == 4
    for recorder in recorders:
        names = {name for name, _ in recorder.ran}
        assert {"addmm", "silu"} <= names  # they are recorded
        built = {"arange", "cos", "sin", "masked_fill", "masked_fill_", "zeros", "full", "bitwise_and", "le"}
        # within each call torch's own sdpa makes numbers of the mask's booleans
        assert not names & (built if implementation == "sdpa" else {*built, "where"})


@pytest.mark.parametrize("mask", ["block", "full"])
@pytest.mark.parametrize("side", ["left", "none"])
def test_no_step_copies_the_caches(mask, side):
    model = tiny(torch.float32, **PAIR, mask=mask)
    config, inputs = model.config, prompts(model.config, side, torch.float32)
    _, recorders, places = record_steps(model, inputs, num_steps=3)
    length = inputs["input_ids"].shape[1] + 2 * config.depth_config.num_tokens
    keys = length + config.state_history + config.chunk_size
    shared = 0
    for recorder in recorders:
        for name, outputs in recorder.ran:
            shape = outputs.shape if isinstance(outputs, torch.Tensor) else ()
            # of keys and values of the whole prefix, not of scores and masks
            if len(shape) == 4 and shape[2] == keys:
                assert outputs.untyped_storage().data_ptr() in places[0], name
                shared += 1
    assert shared >= 3 * 2 * config.text_config.num_hidden_layers


# ---- what people expect of a transformers model


def losses_and_gradients(model, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    found = {name: value for name, value in output.items() if name.endswith("loss") or name in ("velocity", "depth")}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", ["block", "full", "stereo"])
def test_eager_equals_sdpa(variant):
    """Eager attention takes its softmax in float32."""
    found, chunks = [], []
    for name in ("sdpa", "eager"):
        model = tiny(**VARIANTS[variant], language_loss_weight=0.5)
        model.set_attn_implementation(name)
        inner, expert = model.model, model.action_expert
        transformers = (inner.vlm.language_model, inner.depth_expert.decoder, expert.transformer)
        assert {transformer.config._attn_implementation for transformer in transformers} == {name}
        found.append(losses_and_gradients(model, training_batch(model.config, answers=True)))
        chunks.append(model.predict_action(**prompts(model.config), noise=some_noise(model.config)))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        # a key's bias changes no attention: its gradient is rounding noise of its weight's
        scale = max(part.abs().max().item() for part in (value, found[0][name.replace(".bias", ".weight")]))
        torch.testing.assert_close(found[1][name], value, atol=1e-5 * scale + 1e-8, rtol=0)
    torch.testing.assert_close(*chunks, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mask", ["block", "full"])
def test_checkpointed_layers_give_the_same_losses_and_gradients(mask):
    found = []
    for checkpointing in (False, True):
        model = tiny(**PAIR, **POINTING, mask=mask, language_loss_weight=0.5).train()
        calls = Counter()
        layers = {"VLM": model.model.vlm.language_model.layers[0], "depth": model.model.depth_expert.decoder.layers[0]}
        layers["action"] = model.action_expert.transformer.layers[0]
        for name, layer in layers.items():
            layer.input_layernorm.register_forward_hook(lambda *_, name=name, calls=calls: calls.update([name]))
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = mixed_batch(model.config)
        with float64_throughout():
            found.append(losses_and_gradients(model, batch))
        assert calls == dict.fromkeys(layers, 1 + checkpointing)  # they really are computed again
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-12, rtol=1e-9, equal_nan=True)


@pytest.mark.parametrize(("variant", "split"), [("block", True), ("no depth expert", True), ("full", False)])
def test_layers_that_run_together_are_not_named_as_parts_of_their_own(variant, split):
    """FSDP gathers the weights of a named part when it is called, and these are not called."""
    model = tiny(torch.float32, **VARIANTS[variant])
    for part in (model, model.model):
        assert ("GemmaDecoderLayer" in part._no_split_modules) == split
        assert "SiglipEncoderLayer" in part._no_split_modules


def mixed_batch(config) -> dict:
    """Samples with actions, answers and keyframes, none of which has all."""
    batch = training_batch(config, answers=True)
    batch["is_action"] = torch.tensor([True, False, True])
    batch["labels"][0] = -100
    generator = torch.Generator().manual_seed(2)
    batch["points"] = 64 * torch.rand(3, 2, 2, generator=generator, dtype=torch.float64)
    batch["displacement"] = torch.randn(3, config.pose_dim, generator=generator, dtype=torch.float64)
    batch["points"][2], batch["displacement"][1] = float("nan"), float("nan")
    return batch


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_from_the_mixture(variant):
    model = tiny(**VARIANTS[variant], language_loss_weight=0.5, flow_draws=2).train()
    losses_and_gradients(model, mixed_batch(model.config))
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # a key's bias moves all scores of a query alike, which the softmax does not see
    assert [name for name in without if not name.endswith(("k_proj.bias", "key.bias"))] == []


@torch.no_grad()
def test_a_saved_model_is_the_same_to_the_bit(fresh, tmp_path):
    """Here, and by remote code in a process that knows nothing of this project."""
    model = tiny(torch.float32, **PAIR, mask="full")
    inputs = prompts(model.config, dtype=torch.float32) | {"noise": some_noise(model.config, dtype=torch.float32)}
    expected = model.predict_action(**inputs)
    model.save_pretrained(tmp_path)
    again, report = DepthVLAForActionPrediction.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(again.eval().predict_action(**inputs), expected)
    save_file(inputs | {"expected": expected}, tmp_path / "inputs.safetensors")
    assert float(fresh.run(FRESH, str(tmp_path)).stdout.splitlines()[-1]) == 0


# ---- answers


@torch.no_grad()
@pytest.mark.parametrize("types_given", [False, True])
@pytest.mark.parametrize("side", ["left", "none"])
@pytest.mark.parametrize(("mask", "cached"), [("block", True), ("block", False), ("full", False)])
def test_generated_answers_are_those_of_the_training_pass(mask, cached, side, types_given):
    """Where an answer sees the prompt and itself, and nothing sees the answer that is not in it."""
    model = tiny(**PAIR, mask=mask)
    inputs = prompts(model.config, side)
    del inputs["state"]
    types = torch.zeros_like(inputs["input_ids"])
    given = inputs | ({"token_type_ids": types} if types_given else {})
    options = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True, "use_cache": cached}
    generated = model.generate(**given, **options)
    ids, valid = inputs["input_ids"], inputs["attention_mask"]
    for step in range(ANSWER):
        plain = inputs | {"input_ids": ids, "attention_mask": valid, "token_type_ids": types}
        logits = model(**plain, use_cache=False).logits[:, -1]
        torch.testing.assert_close(generated.logits[step].double(), logits, atol=1e-4, rtol=0)
        following = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
        valid, types = (torch.cat([part, torch.ones_like(following)], dim=1) for part in (valid, types))
    assert torch.equal(generated.sequences, ids)
    assert (ids[0, -ANSWER:] != ids[2, -ANSWER:]).any()


@torch.no_grad()
def test_answers_from_a_cache_are_refused_where_the_vlm_sees_depth():
    model = tiny(mask="full")
    inputs = prompts(model.config)
    del inputs["state"]
    with pytest.raises(ValueError, match="mask is 'full': the VLM sees .*; generate with use_cache=False"):
        model.generate(**inputs, max_new_tokens=2)
    assert tiny(mask="full", depth_expert=False).generate(**inputs, max_new_tokens=2).shape[0] == 3


# ---- errors


@torch.no_grad()
def test_bad_input_is_refused():
    model = tiny(torch.float32, **PAIR)
    inputs = prompts(model.config, dtype=torch.float32)

    def refuse(message: str, error: type[Exception] = ValueError, **changes) -> None:
        with pytest.raises(error, match=message):
            model.predict_action(**inputs | changes)

    refuse(
        r"shape \(3, 1, 3, 64, 64\); it must be \(batch, 2, .* left, wrist", pixel_values=inputs["pixel_values"][:, :1]
    )
    refuse(r"view_mask has shape \(3, 1\); it must be \(3, 2\)", view_mask=inputs["view_mask"][:, :1])
    refuse("leaves out 'left' of a sample", view_mask=inputs["view_mask"].flip(1))
    refuse(r"hold \[32, 16, 32\] image tokens .*: \[32, 32, 32\]|: 2$", view_mask=None)
    refuse(r"image tokens \(id 3\)", input_ids=torch.full_like(inputs["input_ids"], 5))
    refuse(r"state has shape \(3, 1, 6\); it must be \(batch, 1, 7\)", state=inputs["state"][..., :6])
    refuse(r"noise has shape \(1, 1, 1\)", noise=torch.zeros(1, 1, 1))
    refuse("num_steps is 0", num_steps=0)
    refuse("mark an answer", token_type_ids=torch.ones_like(inputs["input_ids"]))
    refuse(r"unknown inputs \['labels'\]", TypeError, labels=inputs["input_ids"])
    with pytest.raises(TypeError, match="forward has no input 'view_masks'; did you mean 'view_mask'"):
        model(**inputs, view_masks=None)
    with pytest.raises(ValueError, match="input_ids is missing"):
        model.model(pixel_values=inputs["pixel_values"], inputs_embeds=torch.zeros(3, 40, 64))
    with pytest.raises(ValueError, match="cannot freeze semantic; this model has vision, projector, .*depth_encoder"):
        model.freeze("semantic")
