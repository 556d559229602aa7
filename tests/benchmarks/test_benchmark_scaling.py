"""benchmarks.scaling: what it counts is what the sizes of the layers say, and the command prints every table."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from stereovla.benchmarks.scaling import FLOAT, TOWERS, main, number_of_tokens, part_costs, state_bytes
from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction


def test_counts_follow_from_the_sizes_of_the_layers():
    config = StereoVLAConfig.from_preset("tiny")
    with FakeTensorMode(), no_init_weights():
        model = StereoVLAForActionPrediction(config).train().freeze(*TOWERS)
        costs = part_costs(model)
    rows, hidden, width = config.num_visual_tokens, config.projector_hidden_size, config.text_config.hidden_size
    products = [config.fused_size * hidden, hidden * width, width * width]  # of a token, each one multiply and one add
    assert costs["projector"].forward == 2 * rows * sum(products)
    # two products for each of the forward pass, but for the gradient of what frozen towers give
    assert costs["projector"].backward == 2 * rows * (2 * sum(products) - products[0])
    text, tokens = config.text_config, number_of_tokens(config)
    heads = text.num_attention_heads + text.num_key_value_heads
    weights = width * (2 * heads * text.head_dim + 3 * text.intermediate_size)
    attention = 2 * tokens * text.num_attention_heads * text.head_dim  # scores and sums of values
    assert costs["language_model"].forward == 2 * tokens * text.num_hidden_layers * (weights + attention)
    assert not any(costs[name].backward or costs[name].kept for name in TOWERS)
    # the input of the first layer in bfloat16, and at least input and output of each GELU behind the others
    assert costs["projector"].kept >= 2 * rows * (config.fused_size + 2 * hidden)


def test_states_are_sixteen_bytes_of_a_trained_weight_and_four_of_a_frozen_one():
    with torch.device("meta"):
        model = StereoVLAForActionPrediction(StereoVLAConfig.from_preset("full")).freeze(*TOWERS)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    whole = 16 * trained + 4 * frozen
    assert state_bytes(model, 8, split=False) == whole
    gathered = state_bytes(model, 10**12, split=True)
    assert state_bytes(model, 8, split=True) == pytest.approx(whole / 8 + gathered, rel=1e-6)
    assert FLOAT * frozen < gathered + FLOAT * 1e9 and gathered < whole / 4


def test_the_command_prints_its_tables(capsys):
    main(["--preset", "tiny", "--devices", "2,4", "--lora_rank", "2"])
    printed = capsys.readouterr().out
    for text in ("| language_model |", "| 4 |", "| adapters of rank 2 | FSDP2 | 2 |", "A checkpoint is"):
        assert text in printed
    with pytest.raises(SystemExit, match="utilisation is 2.0"):
        main(["--utilisation", "2"])
