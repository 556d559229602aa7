"""Converters of DepthVLA's parts, against live models of transformers: what they compute, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from published_pi0 import (
    IMAGE_TOKEN,
    SIDE,
    VISUAL_TOKENS,
    VOCABULARY,
    depth_anything,
    hub_paligemma_key,
    paligemma,
    paligemma_config,
    pi0,
    randomized,
    write,
    write_pi0,
)
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, PI0ForConditionalGeneration

from stereovla.modeling_stereovla import (
    DepthExpertConfig,
    DepthExpertModel,
    DepthVLAConfig,
    DepthVLAForActionPrediction,
    convert_depthvla,
    convert_pi0,
)
from stereovla.modeling_stereovla.convert_output import write_model

SMALL = {"action_vocab_size": VOCABULARY}
EXPERT = {"expert_hidden_size": 32, "expert_intermediate_size": 48}
DECODER = {"depth_config": {"decoder_config": {"hidden_size": 16, "intermediate_size": 24}}}


def options(out, **changes) -> convert_depthvla.Options:
    overrides = SMALL | (EXPERT if "vlm" in changes else {}) | changes.pop("overrides", {})
    changes = {name: value if isinstance(value, (list, int, float)) else str(value) for name, value in changes.items()}
    given = {"dtype": "float32", "vision_heads": 2, "overrides": json.dumps(overrides), **changes}
    return convert_depthvla.Options(out=str(out), **given)


def convert(given: convert_depthvla.Options):
    return write_model(given, *convert_depthvla.gather(given))


def loaded(folder) -> DepthVLAForActionPrediction:
    model, report = DepthVLAForActionPrediction.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


def saved_by_transformers(model: DepthVLAForActionPrediction, folder):
    """Under the names of older versions, which a model gets that was not loaded under others."""
    fresh = DepthVLAForActionPrediction(model.config)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(folder)
    assert any("language_model.model.layers" in key for key in load_file(folder / "model.safetensors"))
    return folder


def our_key(key: str) -> str | None:
    """DepthVLA's name of PI0ForConditionalGeneration's weight; None for the one that nothing uses."""
    if key == "model.dit.embed_tokens.weight":
        return None
    for theirs, ours in (
        ("model.vlm.", "model.vlm."),
        ("model.dit.", "action_expert.transformer."),
        ("embed_action_time.", "action_expert."),
        ("action_out_proj.", "action_expert.action_out_proj."),
    ):
        if key.startswith(theirs):
            return key.replace(theirs, ours, 1)
    raise AssertionError(key)


def batch(image_token: int, side: str) -> dict[str, torch.Tensor]:
    """Three samples, padded on one side; the second has one of two views."""
    generator = torch.Generator().manual_seed(0)
    view_mask = torch.tensor([[True, True], [True, False], [True, True]])
    length = 2 * VISUAL_TOKENS + 7
    ids, mask = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    for row, views in enumerate(view_mask.sum(-1).tolist()):
        words = torch.randint(10, 200, (3 + row,), generator=generator)
        tokens = torch.cat([torch.full((views * VISUAL_TOKENS,), image_token), torch.tensor([2]), words])
        place = slice(length - len(tokens), length) if side == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    pixels = torch.rand(3, 2, 3, SIDE, SIDE, generator=generator) * view_mask[..., None, None, None]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "view_mask": view_mask}


def compare_with_pi0(ours: DepthVLAForActionPrediction, theirs: PI0ForConditionalGeneration, side: str) -> None:
    """Chunks, velocities, loss and every gradient, within 1e-5 of a standard deviation."""
    inputs = batch(theirs.config.vlm_config.image_token_id, side)
    generator = torch.Generator().manual_seed(1)
    state, time = torch.randn(3, 32, generator=generator), torch.rand(3, generator=generator)
    actions, noise = (torch.randn(3, 5, 32, generator=generator) for _ in range(2))
    their_inputs = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": 2 * inputs["pixel_values"] - 1,
        "pixel_attention_mask": inputs["view_mask"],
        "state": state,
    }
    drawn = {"noise": noise[:, None], "time": time[:, None]}
    out = ours(**inputs, state=state[:, None], actions=actions, **drawn)
    expected = theirs(**their_inputs, actions=actions, noise=noise, timestep=time)

    def close(found: torch.Tensor, right: torch.Tensor) -> None:
        assert (found - right).abs().max() <= 1e-5 * right.std()

    close(out.velocity[:, 0], expected.logits)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    out.loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    scales = {name: p.grad.std() for name, p in theirs.named_parameters() if p.grad is not None}
    worst = 0.0
    for name, parameter in theirs.named_parameters():
        gradient = gradients.pop(our_key(name), None)
        if parameter.grad is None or not parameter.grad.any():
            assert gradient is None or not gradient.any(), name  # of the VLM's last layer, which nobody reads
        else:
            # a key's bias changes no attention: its gradient is rounding noise of its weight's
            scale = scales[name.replace("k_proj.bias", "k_proj.weight")]
            worst = max(worst, ((gradient - parameter.grad).abs().max() / scale).item())
    assert worst <= 1e-5
    assert not gradients
    chunk = theirs.sample_actions(**their_inputs, noise=noise)
    close(ours.predict_action(**inputs, state=state[:, None], noise=noise), chunk)


# ---- pi0


@pytest.mark.parametrize("layout", ["saved", "transformers", "openpi", "lerobot"])
def test_pi0_becomes_a_depthvla_that_computes_the_same(tmp_path, layout):
    theirs = pi0(image_token=257152 if layout in ("openpi", "lerobot") else IMAGE_TOKEN)
    given = options(tmp_path / "ours", pi0=write_pi0(tmp_path / "pi0", theirs, layout), views=["left", "wrist"])
    if layout == "openpi":  # whose config does not say it
        given = replace(given, overrides=json.dumps(SMALL | {"num_inference_steps": 3}))
    ours = loaded(convert(given))
    config = ours.config
    assert (config.state_dim, config.action_dim, config.chunk_size, config.depth_config) == (32, 32, 5, None)
    assert (config.time_min, config.time_max, config.num_visual_tokens) == (0.001, 1.0, VISUAL_TOKENS)
    assert (config.expert_hidden_size, config.text_config.head_dim, config.text_config.vocab_size) == (32, 16, 320)
    for side in ("left", "right"):
        compare_with_pi0(ours, theirs, side)
        ours.zero_grad()
        theirs.zero_grad()


@pytest.mark.parametrize("saved", [False, True])
def test_depthvla_without_depth_expert_becomes_a_pi0_again(tmp_path, saved):
    theirs = pi0()
    folder = convert(
        options(tmp_path / "ours", pi0=write_pi0(tmp_path / "pi0", theirs, "saved"), views=["left", "wrist"])
    )
    if saved:
        folder = saved_by_transformers(loaded(folder), tmp_path / "saved")
    back = convert_pi0.convert(convert_pi0.Options(checkpoint=str(folder), out=str(tmp_path / "back")))
    again, report = PI0ForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    first, second = theirs.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert different == ["model.dit.embed_tokens.weight"] and not second[different[0]].any()
    for name in ("chunk_size", "max_state_dim", "max_action_dim", "num_inference_steps", "time_sampling_offset"):
        assert getattr(again.config, name) == getattr(theirs.config, name), name
    assert again.config.time_sampling_scale == pytest.approx(0.999, abs=1e-12)
    compare_with_pi0(loaded(folder), again.eval(), "right")


def test_pi05_and_other_models_are_refused(tmp_path):
    theirs = pi0()
    weights = load_file(write_pi0(tmp_path / "openpi", theirs, "openpi") / "model.safetensors")
    weights |= {"time_mlp_in.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"is a pi0.5 \(it has time_mlp_in.weight\)"):
        convert_pi0.open_pi0(write(tmp_path / "pi05", weights, {"action_horizon": 5}), vision_heads=2)
    with pytest.raises(ValueError, match="is a pi0.5: its time"):
        convert_pi0.open_pi0(write(tmp_path / "typed", {}, {"type": "pi05"}))
    with pytest.raises(ValueError, match="is a 'act'; valid: 'pi0', of transformers, openpi or LeRobot"):
        convert_pi0.open_pi0(write(tmp_path / "act", {}, {"type": "act"}))
    del weights["time_mlp_in.weight"]
    with pytest.raises(ValueError, match="does not say how many steps a chunk has"):
        convert_pi0.open_pi0(write(tmp_path / "bare", weights, {}), vision_heads=2)
    with pytest.raises(ValueError, match="vision_heads is 5; it must divide the vision tower's width, 24"):
        convert_pi0.open_pi0(tmp_path / "bare", 5, vision_heads=5)
    del weights["state_proj.weight"]
    with pytest.raises(ValueError, match="it lacks the weight that becomes action_expert.state_proj.weight"):
        convert_pi0.open_pi0(write(tmp_path / "less", weights, {"chunk_size": 5}), vision_heads=2)
    theirs.config.dit_config.num_key_value_heads = 2
    with pytest.raises(ValueError, match="num_key_value_heads is 2, not 1"):
        convert_pi0.policy_fields(theirs.config)


def test_an_output_layer_that_is_not_the_embedding_is_refused(tmp_path):
    folder = write_pi0(tmp_path / "pi0", pi0(), "lerobot")
    weights = load_file(folder / "model.safetensors")
    weights["model.paligemma_with_expert.paligemma.lm_head.weight"] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="differs from model.paligemma_with_expert.*tie_word_embeddings true"):
        convert_pi0.open_pi0(folder, vision_heads=2)


def test_what_pi0_does_not_have_is_named(tmp_path):
    config = DepthVLAConfig.from_preset("depthvla-demo", state_history=2, time_embedding_dtype="model")
    with pytest.raises(ValueError) as error:
        convert_pi0.pi0_config(config)
    for name in ("depth_config", "use_pointers", "state_history", "noise_scale", "time_embedding_dtype", "model_type"):
        assert name in str(error.value)
    with pytest.raises(ValueError, match="is a None; valid: the folder of a 'depthvla'"):
        convert_pi0.convert(convert_pi0.Options(checkpoint=str(tmp_path), out=str(tmp_path / "out")))


# ---- PaliGemma


@pytest.mark.parametrize("layout", ["saved", "transformers", "hub", "hub, with its output layer"])
def test_paligemma_becomes_a_vlm_with_the_same_logits(tmp_path, layout):
    """Of prompt and answer: this also compares the prefix mask."""
    theirs = paligemma()
    state = theirs.state_dict()
    if layout == "saved":
        theirs.save_pretrained(tmp_path / "vlm")
    elif layout == "transformers":
        write(tmp_path / "vlm", state, theirs.config.to_dict())
    else:
        kept = {key: value for key, value in state.items() if "," in layout or key != "lm_head.weight"}
        renamed = {hub_paligemma_key(key): value for key, value in kept.items()}
        assert "language_model.model.layers.1.mlp.up_proj.weight" in renamed
        write(tmp_path / "vlm", renamed, theirs.config.to_dict())
    folder = convert(options(tmp_path / "ours", vlm=tmp_path / "vlm", views=["left", "wrist"]))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # the embedding, once
    ours = loaded(folder)
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    inputs = batch(IMAGE_TOKEN, "right")
    answer = torch.tensor([[7, 8, 9, 1]] * 3)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    types = torch.zeros_like(inputs["input_ids"])
    types[:, -answer.shape[1] :] = 1
    seen = inputs["pixel_values"][inputs["view_mask"]]
    with torch.no_grad():
        right = theirs(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            token_type_ids=types,
            position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0),
            pixel_values=2 * seen - 1,
        ).logits
        found = ours(**inputs, token_type_ids=types).logits
        causal = ours(**inputs, token_type_ids=torch.ones_like(types)).logits
    valid = inputs["attention_mask"].bool()
    assert (found - right)[valid].abs().max() <= 1e-5 * right.std()
    assert (causal - right)[valid].abs().max() > 0.1 * right.std()  # the mask makes a difference
    features = theirs.get_image_features(2 * seen - 1).pooler_output
    tokens = ours.model.embed_views(inputs["pixel_values"], inputs["view_mask"])
    torch.testing.assert_close(tokens, features, atol=1e-5, rtol=1e-5)


def test_paligemma_2_and_other_models_are_refused(tmp_path):
    second = paligemma_config().to_dict()
    second["text_config"]["model_type"] = "gemma2"
    with pytest.raises(ValueError, match="has a 'gemma2' for its language model; valid: 'gemma'"):
        convert(options(tmp_path / "out", vlm=write(tmp_path / "second", {}, second)))
    with pytest.raises(ValueError, match="is a 'siglip'; valid: the folder of a 'paligemma'"):
        convert(options(tmp_path / "out", vlm=write(tmp_path / "siglip", {}, {"model_type": "siglip"})))


# ---- Depth Anything


@torch.no_grad()
@pytest.mark.parametrize("kind", ["depth_anything", "dinov2"])
def test_depth_encoder_has_the_backbone_s_features(tmp_path, kind):
    depth, pixels = depth_anything(), batch(IMAGE_TOKEN, "right")["pixel_values"][:, 0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    if kind == "depth_anything":
        right = depth.backbone((pixels - mean) / std).feature_maps[-1]
    else:
        sizes = {
            name: getattr(depth.config.backbone_config, name) for name in ("image_size", "patch_size", "hidden_size")
        }
        config = Dinov2Config(**sizes, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2)
        depth = randomized(Dinov2Model(config), seed=4)
        right = depth((pixels - mean) / std).last_hidden_state
    depth.save_pretrained(tmp_path / "depth")
    paligemma().save_pretrained(tmp_path / "vlm")
    given = options(tmp_path / "ours", vlm=tmp_path / "vlm", depth_encoder=tmp_path / "depth", overrides=DECODER)
    model = loaded(convert(given))
    features = model.model.depth_expert.encoder(pixels)
    assert features.shape == (3, VISUAL_TOKENS, 24)  # with positions interpolated from 5 x 5 patches
    assert (features - right[:, 1:]).abs().max() <= 1e-5 * right.std()
    assert model.config.depth_expert_source == str(tmp_path / "depth")


def test_other_depth_encoders_are_refused(tmp_path):
    paligemma().save_pretrained(tmp_path / "vlm")
    other = write(tmp_path / "other", {}, {"model_type": "zoedepth"})
    with pytest.raises(ValueError, match="is a 'zoedepth'; valid depth encoders: depth_anything, dinov2"):
        convert(options(tmp_path / "out", vlm=tmp_path / "vlm", depth_encoder=other))
    depth_anything(patch=8).save_pretrained(tmp_path / "depth")
    given = {"overrides": {"use_pointers": True, **DECODER}}
    with pytest.raises(StrictDataclassError, match="have 8 px; pointers read"):
        convert(options(tmp_path / "out", vlm=tmp_path / "vlm", depth_encoder=tmp_path / "depth", **given))


# ---- the whole


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of PaliGemma, Depth Anything and PI0."""
    folder = tmp_path_factory.mktemp("parts")
    for name, model in (("vlm", paligemma()), ("depth", depth_anything()), ("pi0", pi0())):
        model.save_pretrained(folder / name)
    return folder


def act(model: DepthVLAForActionPrediction) -> torch.Tensor:
    ids = torch.tensor([[IMAGE_TOKEN] * VISUAL_TOKENS + [2, 7, 8, 9]])
    pixels = torch.rand(1, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    state, shape = torch.zeros(1, 1, model.config.state_dim), (1, model.config.chunk_size, model.config.action_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return model.predict_action(input_ids=ids, pixel_values=pixels, state=state, noise=noise)


def test_assembled_model_acts_and_its_new_parts_depend_on_the_seed(parts, tmp_path):
    given = {"vlm": parts / "vlm", "depth_encoder": parts / "depth", "overrides": DECODER}
    folders = [convert(options(tmp_path / str(seed), seed=seed, **given)) for seed in (0, 1)]
    first, other = (load_file(folder / "model.safetensors") for folder in folders)
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    new = ("action_expert.", *(f"model.depth_expert.{name}." for name in ("projector", "decoder", "head")))
    assert changed and all(key.startswith(new) for key in changed)
    weight = first["model.depth_expert.projector.weight"]
    assert weight.std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)
    model = loaded(folders[0])
    assert model.config.depth_map_loss_weight == 1 and model.config.action_dim == 7
    chunk = act(model)
    assert chunk.shape == (1, 16, 7) and chunk.isfinite().all()
    many = convert(options(tmp_path / "many", max_shard_gb=1e-5, **given))
    assert len(list(many.glob("model-*.safetensors"))) > 3
    state = loaded(many).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_trained_depth_expert_enters_whole_and_pi0_keeps_its_action_expert(parts, tmp_path):
    shape = {**paligemma_config().text_config.to_dict(), "hidden_size": 16, "intermediate_size": 24, "vocab_size": 1}
    encoder = depth_anything().config.backbone_config.to_dict()
    config = DepthExpertConfig(encoder_config=encoder, decoder_config=shape, image_size=SIDE, patch_size=16)
    expert = randomized(DepthExpertModel(config), seed=3)
    expert.save_pretrained(tmp_path / "expert")
    model = loaded(convert(options(tmp_path / "out", pi0=parts / "pi0", depth_expert=tmp_path / "expert")))
    pixels = torch.rand(1, 1, 3, SIDE, SIDE)
    torch.testing.assert_close(model.model.depth_expert(pixels).depth, expert(pixels).depth)
    alone = loaded(convert(options(tmp_path / "alone", pi0=parts / "pi0")))
    ours, theirs = model.action_expert.state_dict(), alone.action_expert.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not torch.equal(act(model), act(alone))  # it reads the depth expert too


def test_all_wrong_keys_are_listed_and_nothing_is_written(parts, tmp_path):
    for name in ("vlm", "depth"):
        weights = load_file(parts / name / "model.safetensors")
        if name == "vlm":
            del weights["language_model.model.layers.1.mlp.up_proj.weight"]
            weights["language_model.model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
            weights["ema.step"] = torch.zeros(1)
        else:
            weights["backbone.layernorm.bias"] = torch.zeros(5)
            weights["pretrained.cls_token"] = torch.zeros(1)
        description = json.loads((parts / name / "config.json").read_text())
        write(tmp_path / name, weights, description)
    with pytest.raises(ValueError, match="not a set of parts of one DepthVLA") as error:
        given = {"vlm": tmp_path / "vlm", "depth_encoder": tmp_path / "depth", "overrides": DECODER}
        convert(options(tmp_path / "out", **given))
    for text in (
        "2 unknown published keys: ema.step, pretrained.cls_token",
        "1 converted keys that the model lacks: model.vlm.language_model.layers.2.mlp.up_proj.weight",
        "1 parameters of the model that the file lacks: model.vlm.language_model.layers.1.mlp.up_proj.weight",
        "1 keys of another shape: model.depth_expert.encoder.tower.layernorm.bias (5,), expected (24,)",
    ):
        assert text in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth", "vlm"]


def test_parts_that_exclude_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--vlm and --pi0 both bring the VLM, and neither is given"):
        convert(options(tmp_path / "out"))
    with pytest.raises(ValueError, match="and both are given; give one of them"):
        convert(options(tmp_path / "out", vlm="a", pi0="b"))
    with pytest.raises(ValueError, match="--depth_expert has an encoder of its own"):
        convert(options(tmp_path / "out", vlm="a", depth_encoder="b", depth_expert="c"))


def test_saved_names_are_accepted_by_load_state_dict(parts, tmp_path):
    """As `Trainer` loads when it resumes."""
    given = {"vlm": parts / "vlm", "depth_encoder": parts / "depth", "overrides": DECODER}
    model = loaded(convert(options(tmp_path / "a", **given)))
    weights = load_file(saved_by_transformers(model, tmp_path / "saved") / "model.safetensors")
    fresh = DepthVLAForActionPrediction(model.config)
    report = fresh.load_state_dict(weights, strict=False)
    assert report.missing_keys == ["lm_head.weight"] and not report.unexpected_keys  # tied
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())
