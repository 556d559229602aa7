"""The expert's block mask against the recorded one of the published code, and what may influence what."""

import pytest
import torch

from stereovla.modeling_stereovla import StereoVLAConfig
from stereovla.modeling_stereovla.action_expert import ActionExpert, Prefix, expert_mask


def brute_force_mask(prefix, num_state, chunk, num_chunks):
    size = num_state + num_chunks * chunk
    mask = torch.zeros(len(prefix), 1, size, len(prefix[0]) + size, dtype=torch.bool)
    block = [-1] * num_state + [i for i in range(num_chunks) for _ in range(chunk)]
    for b, row in enumerate(prefix):
        for query in range(size):
            for key, valid in enumerate(row):
                mask[b, 0, query, key] = bool(valid)
            for key in range(size):
                mask[b, 0, query, len(row) + key] = block[key] == -1 or block[key] == block[query]
    return mask


@pytest.mark.parametrize("chunks", [1, 3])
def test_mask_equals_a_loop(chunks):
    prefix = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert torch.equal(expert_mask(prefix, 2, 3, chunks), brute_force_mask(prefix.tolist(), 2, 3, chunks))


@pytest.fixture(scope="module")
def expert_case():
    config = StereoVLAConfig.from_preset("tiny")
    torch.manual_seed(0)
    expert = ActionExpert(config).eval()
    text = config.text_config
    shape = (2, text.num_key_value_heads, 6, text.head_dim)
    states = [(torch.randn(shape), torch.randn(shape)) for _ in range(text.num_hidden_layers)]
    tokens = torch.randn(2, 4, config.expert_hidden_size)
    actions, time = torch.randn(2, 3, config.chunk_size, 7), torch.rand(2, 3)
    return expert, states, tokens, actions, time


@torch.no_grad()
def test_draws_of_one_sample_do_not_see_each_other(expert_case):
    expert, states, tokens, actions, time = expert_case
    mask = torch.ones(2, 6, dtype=torch.long)
    together = expert(Prefix.of(states, mask), tokens, actions, time)
    for draw in range(3):
        alone = expert(Prefix.of(states, mask), tokens, actions[:, draw : draw + 1], time[:, draw : draw + 1])
        torch.testing.assert_close(alone[:, 0], together[:, draw], atol=2e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("padded", [False, True])
def test_denoising_steps_equal_the_single_pass(expert_case, implementation, padded):
    expert, states, tokens, actions, time = expert_case
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]) if padded else torch.ones(2, 6, dtype=torch.long)
    together = expert(Prefix.of(states, mask), tokens, actions, time[:1].expand(2, -1))
    config = expert.transformer.config
    before, config._attn_implementation = config._attn_implementation, implementation
    prefix = expert.read_prefix(Prefix.of(states, mask), tokens, actions.shape[2])
    # one object serves every step
    apart = [expert.denoise(prefix, actions[:, draw], expert.embed_time(time[0, draw])) for draw in range(3)]
    # flash kernels take no mask of blocks: the expert goes on with sdpa
    assert config._attn_implementation == ("eager" if implementation == "eager" else "sdpa")
    config._attn_implementation = before
    torch.testing.assert_close(torch.stack(apart, dim=1), together, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_masked_prefix_has_no_influence_and_positions_do_not_count_it(expert_case):
    expert, states, tokens, actions, time = expert_case
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    padded = expert(Prefix.of(states, mask), tokens, actions, time)
    cut = [(keys[:, :, 2:], values[:, :, 2:]) for keys, values in states]
    torch.testing.assert_close(padded, expert(Prefix.of(cut, mask[:, 2:]), tokens, actions, time), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_eager_equals_sdpa(expert_case):
    expert, states, tokens, actions, time = expert_case
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    implementation = expert.transformer.config._attn_implementation
    outputs = []
    for name in ("sdpa", "eager"):
        expert.transformer.config._attn_implementation = name
        outputs.append(expert(Prefix.of(states, mask), tokens, actions, time))
    expert.transformer.config._attn_implementation = implementation
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)
