"""What people expect of a transformers model: dtypes, sharding, attention implementations, compile, checkpointing,
freezing, generators.
"""

import pytest
import torch
from test_modeling_stereovla import make_inputs, make_training_inputs

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction


def tiny(**options) -> StereoVLAForActionPrediction:
    torch.manual_seed(0)
    return StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny", **options)).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


def test_sharded_weights_load_in_another_dtype_and_by_device_map(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = StereoVLAForActionPrediction.from_pretrained(tmp_path, device_map={"": "cpu"})
    inputs, noise = make_inputs(model.config), torch.randn(2, model.config.chunk_size, 7)
    expected = model.predict_action(**inputs, noise=noise)
    assert torch.equal(again.predict_action(**inputs, noise=noise), expected)
    # weights that stay on disk until they are needed
    device_map = {"model": "disk", "lm_head": "cpu", "action_expert": "disk"}
    offloaded = StereoVLAForActionPrediction.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert {p.device.type for p in offloaded.parameters()} == {"meta", "cpu"}
    assert torch.equal(offloaded.predict_action(**inputs, noise=noise), expected)
    half = StereoVLAForActionPrediction.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    chunk = half.predict_action(**inputs, noise=noise, chain_of_thought=False)
    reference = model.predict_action(**inputs, noise=noise, chain_of_thought=False)
    assert chunk.isfinite().all() and (chunk - reference).abs().mean() < 0.1 * reference.abs().mean()


@pytest.mark.parametrize("chain_of_thought", [False, True])
def test_eager_equals_sdpa(model, chain_of_thought):
    inputs, noise = make_inputs(model.config), torch.randn(2, model.config.chunk_size, 7)
    inputs["attention_mask"][0, 0] = 0
    chunks = []
    for name in ("eager", "sdpa"):
        other = tiny()
        other.set_attn_implementation(name)
        chunks.append(other.predict_action(**inputs, noise=noise, chain_of_thought=chain_of_thought))
    torch.testing.assert_close(*chunks, atol=1e-5, rtol=1e-4)


def test_chunks_follow_the_generator_and_the_number_of_steps(model):
    inputs = make_inputs(model.config)
    first, second, other = (
        model.predict_action(**inputs, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second) and not torch.allclose(first, other)
    noise = torch.randn(2, model.config.chunk_size, 7)
    fine = model.predict_action(**inputs, noise=noise, num_steps=40)
    errors = [(model.predict_action(**inputs, noise=noise, num_steps=n) - fine).abs().mean() for n in (2, 10)]
    assert errors[1] < errors[0]  # Euler steps converge


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_denoising_step_compiles_in_one_graph(backend):
    model = tiny()
    inputs, noise = make_inputs(model.config), torch.randn(2, model.config.chunk_size, 7)
    expected = model.predict_action(**inputs, noise=noise, chain_of_thought=False)
    expert = model.action_expert
    expert.denoise = torch.compile(expert.denoise, fullgraph=True, backend=backend)
    compiled = model.predict_action(**inputs, noise=noise, chain_of_thought=False)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_loss_and_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        calls = []
        layer = model.action_expert.transformer.layers[0]
        layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = make_training_inputs(model.config)
        output = model(**inputs, generator=torch.Generator().manual_seed(0))
        output.loss.backward()
        assert len(calls) == 1 + checkpointing  # it really computes the layer again
        gradients.append((output.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert gradients[0][1].keys() == gradients[1][1].keys()
    for name, gradient in gradients[0][1].items():
        torch.testing.assert_close(gradient, gradients[1][1][name], atol=1e-5, rtol=1e-3)


def test_frozen_parts_do_not_change():
    model = tiny().train().freeze("semantic", "spatial", "stereo")
    towers = model.model.visual_tokens
    before = {name: value.clone() for name, value in towers.stereo.state_dict().items()}
    output = model(**make_training_inputs(model.config))
    output.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(name.startswith(f"model.visual_tokens.{part}.") for name in trained for part in model.frozen)
    assert any(name.startswith("model.visual_tokens.projector.") for name in trained)
    # running statistics stand still as well
    assert all(torch.equal(before[name], value) for name, value in towers.stereo.state_dict().items())
    model.freeze("stereo")
    assert all(p.requires_grad for p in towers.semantic.parameters()) and towers.semantic.training
    assert "mask_token" in dict(towers.spatial.tower.embeddings.named_buffers())  # it never trains, so it cannot thaw
    with pytest.raises(ValueError, match="cannot freeze pointers, tower; this model has semantic, spatial"):
        model.freeze("tower", "pointers")
