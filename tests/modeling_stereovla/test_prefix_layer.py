"""The last layer of a prefix leaves the keys and values of a whole pass behind and what its last token is, and computes
nothing else.
"""

import pytest
import torch
from test_modeling_stereovla import make_training_inputs
from transformers import LlamaConfig, LlamaModel

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.layer_caches import CACHE, PrefixCache, RecordingCache
from stereovla.modeling_stereovla.prefix_layer import PrefixLayer, with_prefix_layer


def language_model(layers: int = 3) -> LlamaModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, head_dim=12, num_hidden_layers=layers, vocab_size=50)
    return LlamaModel._from_config(config, dtype=torch.float64)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("attention", "padding"), [("sdpa", 0), ("sdpa", 2), ("eager", 0)])
@pytest.mark.parametrize("layers", [1, 3])
def test_keys_values_and_last_token_are_those_of_a_whole_pass(layers, padding, checkpointed, attention):
    """With their gradients."""
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [0] * padding + [1] * (7 - padding)])
    found = []
    for change, cache in ((lambda model: model, RecordingCache()), (with_prefix_layer, PrefixCache())):
        model = change(language_model(layers)).train()
        model.set_attn_implementation(attention)
        if checkpointed:
            for layer in model.layers:
                layer._can_checkpoint_with_cache = True
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        states = model(input_ids=ids, attention_mask=mask, use_cache=False, **{CACHE: cache}).last_hidden_state
        assert states.shape == ((2, 1, 48) if isinstance(cache, PrefixCache) else (2, 7, 48))
        stream = [states[:, -1], *(state for states in cache.stream for state in states)]
        sum(state.square().sum() for state in stream).backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((stream, gradients))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_pass_of_another_kind_is_what_it_was():
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))
    expected, model = language_model()(input_ids=ids, use_cache=False), with_prefix_layer(language_model())
    assert type(model.layers[-1]) is PrefixLayer and type(model.layers[0]) is not PrefixLayer
    assert model.state_dict().keys() == language_model().state_dict().keys()
    for cache in (None, RecordingCache()):
        found = model(input_ids=ids, use_cache=False, **{CACHE: cache})
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def rows_of_queries(model: StereoVLAForActionPrediction, run) -> list[int]:
    """How many tokens the last layer of the language model makes queries of, in each of its passes."""
    made = []
    projection = model.model.language_model.layers[-1].self_attn.q_proj
    hook = projection.register_forward_hook(lambda module, inputs, output: made.append(output.shape[1]))
    run()
    hook.remove()
    return made


def test_nothing_is_asked_where_nobody_reads_the_answer():
    torch.manual_seed(0)
    config = StereoVLAConfig.from_preset("tiny", chain_of_thought=False)
    model = StereoVLAForActionPrediction(config)
    inputs = make_training_inputs(config)
    length, pictures = inputs["input_ids"].shape[1], 1 + config.num_image_tokens
    assert rows_of_queries(model, lambda: model(**inputs)) == [length]
    inputs["input_ids"][:] = inputs["input_ids"][:1]
    shared = inputs | {"frames": torch.zeros(len(inputs["input_ids"]), dtype=torch.int64)}
    shared["pixel_values"] = inputs["pixel_values"][:1]
    assert rows_of_queries(model, lambda: model(**shared)) == [1, length - pictures]
    prompt = {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask", "state")}
    assert rows_of_queries(model, lambda: model.predict_action(**prompt)) == [1]
    assert rows_of_queries(model, lambda: model.predict_action(**prompt, chain_of_thought=True))[0] == length
