"""transformers' own PI0 behind our interface: its loss, its chunks, and the same numbers as our pi0."""

import pytest
import torch
from published_pi0 import randomized
from tiny_depthvla import prompts, training_batch
from transformers import PI0ForConditionalGeneration

from stereovla.modeling_stereovla import DepthVLAConfig, DepthVLAForActionPrediction, PI0Policy, PI0PolicyConfig
from stereovla.modeling_stereovla.convert_pi0 import convert_back

PI0 = "pi0-tiny"


def policy(**overrides) -> PI0Policy:
    return randomized(PI0Policy(PI0PolicyConfig.from_preset(PI0, **overrides)))


def batch(config, **options) -> dict:
    return training_batch(config, dtype=torch.float32, **options)


def test_the_loss_is_that_of_transformers():
    model = policy(flow_draws=2)
    inputs = batch(model.config)
    output = model(**inputs)
    losses = [
        model.pi0(
            state=inputs["state"][:, -1],
            noise=inputs["noise"][:, draw],
            timestep=inputs["time"][:, draw],
            input_ids=inputs["input_ids"],
            pixel_values=2 * inputs["pixel_values"] - 1,
            pixel_attention_mask=inputs["view_mask"],
            attention_mask=inputs["attention_mask"],
            actions=inputs["actions"],
        ).loss
        for draw in range(2)
    ]
    torch.testing.assert_close(output.loss, sum(losses) / 2)
    torch.testing.assert_close(output.action_loss, output.loss)
    assert output.sample_action_loss.shape == (3,) and output.sample_language_loss.isnan().all()


def test_it_is_the_pi0_that_we_compute():
    """Losses and chunks of a DepthVLA without depth expert that has the same weights."""
    model = policy(views=["left", "wrist"])
    config = model.config
    ours = DepthVLAConfig.from_preset("depthvla-tiny", depth_expert=False, views=["left", "wrist"])
    assert ours.text_config.to_dict() == config.text_config.to_dict()
    ours = DepthVLAForActionPrediction(ours)
    theirs = dict(model.pi0.named_parameters())
    for name, weight in ours.eval().named_parameters():
        if name != "lm_head.weight":
            weight.data.copy_(theirs[next(iter(convert_back(name, weight)))])
    inputs = batch(config)
    torch.testing.assert_close(ours(**inputs).action_loss, model(**inputs).action_loss, atol=1e-5, rtol=1e-4)
    inputs, noise = prompts(config, side="right", dtype=torch.float32), torch.randn(3, 8, 7)
    torch.testing.assert_close(
        ours.predict_action(**inputs, noise=noise), model.predict_action(**inputs, noise=noise), atol=1e-4, rtol=1e-3
    )


def test_untrained_weights_have_the_variance_of_ours():
    torch.manual_seed(0)
    model = PI0Policy(PI0PolicyConfig.from_preset(PI0))
    ours = DepthVLAForActionPrediction(DepthVLAConfig.from_preset("depthvla-tiny", depth_expert=False))
    theirs = dict(model.pi0.named_parameters())
    for name, weight in ours.named_parameters():
        if not name.startswith(("lm_head", "pointers")) and weight.numel() > 500:
            other = theirs[next(iter(convert_back(name, weight)))]
            assert float(other.std().detach()) == pytest.approx(float(weight.std().detach()), rel=0.15, abs=1e-6), name


def test_samples_that_do_not_act_teach_nothing():
    model = policy()
    inputs = batch(model.config)
    acting = torch.tensor([True, False, True])
    rows = {name: value[acting] for name, value in inputs.items()}
    torch.testing.assert_close(model(**inputs, is_action=acting).loss, model(**rows).loss)
    assert model.loss_counts(**inputs, is_action=acting)["action"] == 2
    assert model(**inputs, is_action=torch.zeros(3).bool()).loss == 0
    mask = torch.ones(3, 8).bool()
    mask[0, 3:] = False
    assert model(**inputs, action_mask=mask).loss != model(**inputs).loss


def test_it_is_saved_and_loaded_and_its_inside_is_transformers(tmp_path):
    model = policy()
    inputs, noise = prompts(model.config, side="right", dtype=torch.float32), torch.randn(3, 8, 7)
    expected = model.predict_action(**inputs, noise=noise)
    model.save_pretrained(tmp_path / "policy")
    again, report = PI0Policy.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(again.predict_action(**inputs, noise=noise), expected)
    model.pi0.save_pretrained(tmp_path / "pi0")
    theirs = PI0ForConditionalGeneration.from_pretrained(tmp_path / "pi0").eval()
    chunk = theirs.sample_actions(
        state=inputs["state"][:, -1],
        input_ids=inputs["input_ids"],
        pixel_values=2 * inputs["pixel_values"] - 1,
        pixel_attention_mask=inputs["view_mask"],
        attention_mask=inputs["attention_mask"],
        noise=noise,
    )
    assert torch.equal(chunk, expected)


@pytest.mark.parametrize("preset", ["pi0-demo", "pi0-lab", "pi0-full"])
def test_presets_have_the_sizes_of_depthvla(preset):
    config = PI0PolicyConfig.from_preset(preset)
    other = DepthVLAConfig.from_preset(preset.replace("pi0", "depthvla"), depth_expert=False)
    for name in ("image_size", "patch_size", "expert_hidden_size", "expert_intermediate_size", "chunk_size"):
        assert getattr(config, name) == getattr(other, name)
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "head_dim"):
        assert getattr(config.text_config, name) == getattr(other.text_config, name)
    assert config.vlm_config.vision_config.model_type == "siglip_vision_model"


def test_what_it_has_not_is_refused():
    with pytest.raises(ValueError, match="the presets are pi0-tiny, pi0-demo"):
        PI0PolicyConfig.from_preset("pi0")
    with pytest.raises(Exception, match="use_pointers must be False"):
        PI0PolicyConfig.from_preset(PI0, use_pointers=True)
    model = policy()
    inputs = prompts(model.config, dtype=torch.float32)
    with pytest.raises(ValueError, match="begins every chunk anew"):
        model.predict_action(**inputs, running_actions=torch.zeros(3, 8, 7), delay=1)
    with pytest.raises(ValueError, match="state_dim is 9, and this pi0 is for 7"):
        model.resize_heads(9, 7)
    with pytest.raises(TypeError, match="did you mean 'pixel_values'"):
        model(**batch(model.config), pixel_value=None)


def test_it_is_not_compiled_and_says_what_is():
    with pytest.raises(ValueError, match="not compiled as a whole; a DepthVLA without depth expert computes the same"):
        policy().compile_predict_action()
