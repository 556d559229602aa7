"""The converted miniature of the released StereoVLA against every recorded tensor of the published inference code."""

import pytest
import torch
from released_miniature import (
    GOLDENS,
    converted_model,
    recorded_case,
    recorded_inputs,
    recorded_tensors,
    released_weights,
    show,
)

from stereovla.modeling_stereovla.action_expert import Prefix, expert_mask
from stereovla.modeling_stereovla.convert_files import WeightSource
from stereovla.modeling_stereovla.convert_stereovla import released_rules
from stereovla.modeling_stereovla.flow_matching import interpolate, time_embedding
from stereovla.modeling_stereovla.layer_caches import CACHE

pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"no recorded tensors at {GOLDENS}")
RECORDED = recorded_tensors() if GOLDENS.is_dir() else {}
SPOTS = [0, 1, 15, 16, 100, 128, 239, 255]  # visual tokens whose fused features are recorded
# In units of a tensor's standard deviation. The recording and we are float32: processors' orders of summation differ by
# some 1e-6 here. Not so what depends on the time embedding, whose angles reach 1570 rad: a unit in the last place of a
# period (powers differ between mathematical libraries by one or two) moves an angle by 1.9e-4 rad.
CLOSE, LOOSE = 1e-4, 1e-3
TIMED = (
    "train_v_t train_flow_loss_rows train_flow_loss train_loss suffix_embeds_first expert_last_hidden_first "
    "euler_velocities euler_states action_chunk velocity_v time_embedding"
).split()
ELSEWHERE = ("letterbox_in", "letterbox_out")  # tested with the image processor


@pytest.fixture(scope="module")
def case():
    return recorded_case()


@pytest.fixture(scope="module")
def model(tmp_path_factory, case):
    """The miniature as converted, in float32, shown the recorded inputs of its towers."""
    model = converted_model(tmp_path_factory.mktemp("release") / "stereovla")
    inputs, seed, stereo = recorded_inputs(), case["case"]["seed"], case["case"]["stereo"]
    shapes = {name: (3, 224, 224) for name in ("siglip_pixels", "dino_pixels")}
    shapes["stereo_volume"] = (stereo["height"], stereo["width"], stereo["embed_dim"])
    show(model, *(torch.stack([inputs.normal(f"{n}/{i}", s, seed) for i in range(4)]) for n, s in shapes.items()))
    return model


def with_images(ids: torch.Tensor, value: int) -> torch.Tensor:
    """(B, L) -> (B, L + 256): `value` for the visual tokens, after the first entry."""
    return torch.cat([ids[:, :1], ids.new_full((len(ids), 256), value), ids[:, 1:]], dim=1)


class Watch:
    """Collects what modules are given and what they return: name -> one (arguments, output) for each call."""

    def __init__(self, **modules: torch.nn.Module):
        self.calls = {name: [] for name in modules}
        self.hooks = [
            module.register_forward_hook(self.note(name), with_kwargs=True) for name, module in modules.items()
        ]

    def note(self, name):
        return lambda _module, inputs, keywords, output: self.calls[name].append(
            (dict(enumerate(inputs)) | keywords, output)
        )

    def __enter__(self):
        return self.calls

    def __exit__(self, *_error):
        for hook in self.hooks:
            hook.remove()


def watch_expert(model) -> dict[str, torch.nn.Module]:
    """Where the expert's positions, masks and hidden states pass: once for the state tokens, then in each step."""
    expert = model.action_expert
    transformer = expert.transformer
    return {"rotary": transformer.rotary_emb, "layer": transformer.layers[0], "norm": transformer.norm}


def language_tensors(model, recorded) -> dict[str, torch.Tensor]:
    """Texts without images: right-padded in one batch, and each row alone."""
    names = ("input_ids", "attention_mask", "labels")
    batch = {name: recorded[f"llm_{name}"].long() for name in names}
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = batch["attention_mask"][..., None]
    lengths = batch["attention_mask"].sum(-1).tolist()
    alone = [{name: value[row : row + 1, :size] for name, value in batch.items()} for row, size in enumerate(lengths)]
    return {
        **{f"llm_{name}": value for name, value in batch.items()},
        "llm_logits": model(**plain).logits * mask,
        "llm_last_hidden": model.model(**plain).last_hidden_state * mask,
        "llm_loss": model(**batch).language_loss,
        "llm_loss_rows": torch.stack([model(**row).language_loss for row in alone]),
    }


def training_batch(model, recorded, case) -> dict[str, torch.Tensor]:
    """The recorded batch, the way that our processor gives it to the model."""
    pixels = torch.zeros(4, 2, 3, 224, 224)
    return {
        "input_ids": with_images(recorded["train_input_ids"].long(), model.config.image_token_id),
        "attention_mask": with_images(recorded["train_attention_mask"].long(), 1),
        "labels": with_images(recorded["train_labels"].long(), -100),
        "pixel_values": pixels,
        "state": recorded["train_proprio"],
        "actions": recorded["train_action"],
        "is_action": recorded["train_is_action"].bool(),
        "time": recorded["train_time"][:, None],
        "noise": recorded["train_noise"][:, None],
    }


def training_tensors(model, recorded, case) -> dict[str, torch.Tensor]:
    batch = training_batch(model, recorded, case)
    output = model(**batch)
    with Watch(llm=model.model.language_model, **watch_expert(model)) as calls:
        every = model(**batch | {"is_action": None})
    labelled = recorded["train_labels"][:, 1:] != -100
    logprobs = torch.zeros(labelled.shape)
    labels = recorded["train_labels"][:, 1:][labelled].long()
    logprobs[labelled] = output.logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    noisy, velocity = interpolate(batch["noise"][:, 0], batch["actions"], batch["time"][:, 0])
    return {
        **{f"train_{name}": recorded[f"train_{name}"] for name in ("input_ids", "labels", "attention_mask")},
        **{f"train_{name}": recorded[f"train_{name}"] for name in ("is_action", "action", "proprio", "noise", "time")},
        "train_x_t": noisy,
        "train_u_t": velocity,
        "train_v_t": every.velocity[:, 0],
        "train_flow_loss_rows": every.sample_action_loss,
        "train_flow_loss": output.action_loss,
        "train_llm_loss": output.language_loss,
        "train_loss": output.loss,
        "train_suffix_position_ids": calls["rotary"][0][0][1],
        "train_prefix_position_ids_tail": calls["llm"][0][0]["position_ids"][:, 257:],
        "train_suffix_mask": calls["layer"][0][0]["attention_mask"],
        "train_label_logprobs": logprobs,
    }


def prompt(model, case) -> dict[str, torch.Tensor]:
    recorded = case["inference"]
    ids = torch.tensor([recorded["text_ids"] + recorded["hist_proprio_ids"] + recorded["cur_proprio_ids"]])
    state = recorded_inputs().uniform("proprio/0", (4, 7), case["case"]["seed"])[None]
    return {
        "input_ids": with_images(ids, model.config.image_token_id),
        "pixel_values": torch.zeros(1, 2, 3, 224, 224),
        "state": state,
    }


def embed_time(model, recorded, dtype: torch.dtype) -> torch.Tensor:
    config = model.config
    return time_embedding(recorded["time_embedding_times"], 32, config.min_period, config.max_period, dtype)


def inference_tensors(model, recorded, case) -> dict[str, torch.Tensor]:
    inputs, seed = recorded_inputs(), case["case"]["seed"]
    tokens = model.model.visual_tokens
    parts = {"siglip": tokens.semantic, "dino": tokens.spatial, "projector": tokens.projector}
    parts |= {"model": model.model, "velocity": model.action_expert.action_out_proj, **watch_expert(model)}
    parts["noisy"] = model.action_expert.action_in_proj
    noise = inputs.normal("noise", (1, 5, 7), seed)
    request = prompt(model, case)
    with Watch(**parts) as calls:
        chunk = model.predict_action(**request, noise=noise)
    fused, projected = calls["projector"][0][0][0], calls["projector"][0][1]
    positions = case["inference"]["kv_positions"]
    # the published suffix is one sequence; ours reads the state tokens once and then the chunk behind them
    (state_given, _), (chunk_given, _) = calls["layer"][:2]
    states, state_tokens = state_given[CACHE].streams[0], state_given[0]
    prefix_mask = torch.ones(1, states[0][0].shape[2], dtype=torch.long)
    assert chunk_given["attention_mask"] is None  # without padding the chunk sees everything
    velocity_x = inputs.normal("velocity_x", (1, 5, 7), seed)
    time = model.action_expert.embed_time(torch.tensor(case["case"]["velocity_time"]))
    prefix = model.action_expert.read_prefix(Prefix.of(states, prefix_mask), state_tokens, 5)
    hidden = torch.cat([output.last_hidden_state[:, -1] for _, output in calls["model"]])
    final = with_images(torch.tensor([case["inference"]["final_input_ids"]]), model.config.image_token_id)
    return {
        "siglip_features": calls["siglip"][0][1],
        "dino_features": calls["dino"][0][1],
        "fused_features_spots": fused[:, SPOTS],
        "stereo_pooled": fused[..., -24:],
        "projected": projected,
        "proprio": request["state"],
        "prefix_embeds_spots": model.model.embed(final, projected)[:, positions],
        "kv_cache_spots": torch.stack([torch.stack([k[0], v[0]]) for k, v in states])[:, :, :, positions],
        "greedy_logits": model.lm_head(hidden),
        "suffix_mask": expert_mask(prefix_mask, 4, 5)[0, 0],
        "noise": noise,
        "suffix_embeds_first": torch.cat([state_tokens, chunk_given[0]], dim=1),
        "expert_last_hidden_first": torch.cat([output for _, output in calls["norm"][:2]], dim=1),
        "euler_velocities": torch.cat([output for _, output in calls["velocity"]]),
        "euler_states": torch.cat([*(given[0] for given, _ in calls["noisy"]), chunk]),
        "action_chunk": chunk,
        "velocity_x": velocity_x,
        "velocity_v": model.action_expert.denoise(prefix, velocity_x, time),
        "time_embedding_times": recorded["time_embedding_times"],
        "time_embedding": embed_time(model, recorded, torch.float32),
        "time_embedding_bfloat16": embed_time(model, recorded, torch.bfloat16),
    }


@pytest.fixture(scope="module")
def found(model, case):
    with torch.no_grad():
        return {
            **language_tensors(model, RECORDED),
            **training_tensors(model, RECORDED, case),
            **inference_tensors(model, RECORDED, case),
        }


@pytest.mark.parametrize("name", sorted(RECORDED.keys() - {*ELSEWHERE}))
def test_recorded_tensor(found, case, name):
    recorded, ours = RECORDED[name].double(), found[name].double()
    assert ours.shape == recorded.shape
    if not RECORDED[name].is_floating_point():
        assert torch.equal(ours, recorded)
    scale = case["tensors"][name]["std"] or abs(float(recorded))  # scalars have no spread: relative
    deviation = float((ours - recorded).abs().max()) / scale
    print(f"{name}: {deviation:.1e}")
    assert deviation <= (LOOSE if name in TIMED else CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 7])
def test_greedy_tokens_and_positions(model, case, padding):
    """Ids exactly; the published code pads the prompt by 7 on the left, which must change nothing."""
    recorded, request = case["inference"], prompt(model, case)
    request["attention_mask"] = torch.ones_like(request["input_ids"])
    for name, value in (("input_ids", model.config.text_config.pad_token_id), ("attention_mask", 0)):
        request[name] = torch.nn.functional.pad(request[name], (padding, 0), value=value)
    with Watch(head=model.lm_head, llm=model.model.language_model, **watch_expert(model)) as calls:
        chunk = model.predict_action(**request, noise=RECORDED["noise"])
    tokens = [int(output.argmax(-1)) for _, output in calls["head"]]
    assert tokens == [*recorded["goal_ids"], recorded["eos_slot_id"]]
    margins = torch.stack([output[0].topk(2).values for _, output in calls["head"]]) @ torch.tensor([1.0, -1.0])
    torch.testing.assert_close(margins, torch.tensor(recorded["greedy_margins"][:-1]), rtol=0, atol=2e-4)
    assert len(calls["llm"]) == len(recorded["language_model_calls"])
    for (given, _), call in zip(calls["llm"], recorded["language_model_calls"], strict=True):
        assert int(given["position_ids"][0, -1]) == call["last_position"]
    (given, _), *more = calls["rotary"]  # once for all steps
    assert not more and given[1][0].tolist() == recorded["suffix_position_ids"]
    limit = LOOSE * case["tensors"]["action_chunk"]["std"]
    assert (chunk - RECORDED["action_chunk"]).abs().max() <= limit


def test_gradients_have_the_recorded_norms(model, case):
    """Of the summed loss, for every published parameter: which have one, and how large; the towers are frozen."""
    towers = model.model.visual_tokens
    for tower in (towers.semantic, towers.spatial):
        tower.requires_grad_(False)
    model.zero_grad()
    model(**training_batch(model, RECORDED, case)).loss.backward()
    parameters, text = dict(model.named_parameters()), model.config.text_config
    source = WeightSource.of("miniature", released_weights())
    rules = released_rules(source, text.num_attention_heads, text.num_key_value_heads)
    norms = case["train_grad_norms"]
    assert norms.keys() == source.outlines.keys()
    for key, recorded in norms.items():
        names = rules(key, source.outlines[key])
        gradients = [parameters[name].grad for name in names if name in parameters]  # the mask token is a buffer
        found = [gradient for gradient in gradients if gradient is not None]
        if recorded is None:
            assert not found, key
        else:
            norm = float(torch.stack([gradient.norm() for gradient in found]).norm())
            assert norm == pytest.approx(recorded, rel=LOOSE), key
    model.zero_grad()


@torch.no_grad()
def test_direct_path_skips_the_pose(model, case):
    """Without its chain of thought the expert attends to the prompt alone."""
    with Watch(layer=model.action_expert.transformer.layers[0], head=model.lm_head) as calls:
        model.predict_action(**prompt(model, case), noise=RECORDED["noise"], chain_of_thought=False, num_steps=1)
    assert calls["head"] == []
    assert calls["layer"][0][0][CACHE].streams[0][0][0].shape[2] == 306
