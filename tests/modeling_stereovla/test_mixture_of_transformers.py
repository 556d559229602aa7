"""One attention over all streams under a block mask: against a reference that computes it so, and by what may depend on
what.
"""

import math

import pytest
import torch
from tiny_depthvla import MERGED, float64_throughout, tiny, training_batch
from torch.nn import functional as F

from stereovla.modeling_stereovla.mixture_of_transformers import joint_mask

# ---- the whole model, written from the paper: of one sample and one draw, without padding and absent views


def gemma_norm(x: torch.Tensor, norm) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (1 + norm.weight)


def turned(x: torch.Tensor, positions: torch.Tensor, config) -> torch.Tensor:
    """Rotary embedding of (tokens, heads, size), the first half of a head with the second."""
    half = config.head_dim // 2
    base = torch.tensor(config.rope_parameters["rope_theta"], dtype=torch.float32)
    frequencies = (1 / base ** (torch.arange(half, dtype=torch.float32) / half)).to(x.dtype)  # as the weights: float32
    angles = positions[:, None, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def one_attention(streams: list[tuple], allowed: torch.Tensor) -> list[torch.Tensor]:
    """Last hidden states of each stream.

    Args:
        streams: (transformer, tokens (n, width), positions (n,)) of each; allowed: bool (N, N), N the sum of the n.
    """
    transformers, hidden, positions = (list(part) for part in zip(*streams, strict=True))
    for index in range(len(transformers[0].layers)):
        layers = [transformer.layers[index] for transformer in transformers]
        queries, keys, values = [], [], []
        for layer, x, place in zip(layers, hidden, positions, strict=True):
            attention, normed = layer.self_attn, gemma_norm(x, layer.input_layernorm)
            size = attention.head_dim
            heads = [normed @ part.weight.T for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            q, k, v = (part.view(len(x), -1, size) for part in heads)
            queries.append(turned(q, place, attention.config))
            keys.append(turned(k, place, attention.config))
            values.append(v)
        q, k, v = torch.cat(queries), torch.cat(keys), torch.cat(values)
        groups = q.shape[1] // k.shape[1]
        read = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // groups].T / math.sqrt(q.shape[-1])
            read.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v[:, head // groups])
        read = torch.cat(read, dim=-1).split([len(x) for x in hidden])
        for place, (layer, mine) in enumerate(zip(layers, read, strict=True)):
            x = hidden[place] + mine @ layer.self_attn.o_proj.weight.T
            normed, mlp = gemma_norm(x, layer.post_attention_layernorm), layer.mlp
            gate = F.gelu(normed @ mlp.gate_proj.weight.T, approximate="tanh")
            hidden[place] = x + (gate * (normed @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return [gemma_norm(x, transformer.norm) for transformer, x in zip(transformers, hidden, strict=True)]


def dense_mask(kinds: list[str], full: bool) -> torch.Tensor:
    """Which token sees which, by their kinds: prompt, answer, depth, state or action."""
    seen = {
        "prompt": {"prompt", *(["depth"] if full else [])},
        "answer": {"prompt", "answer", *(["depth"] if full else [])},
        "depth": {"depth", *(["prompt"] if full else [])},
        "state": {"prompt", "depth", "state"},
        "action": {"prompt", "depth", "state", "action"},
    }
    rows = [
        [
            other in seen[kind] and not (kind == other == "answer" and key > query)  # answers are causal
            for key, other in enumerate(kinds)
        ]
        for query, kind in enumerate(kinds)
    ]
    return torch.tensor(rows)


def depth_tokens_of(expert, pixels: torch.Tensor) -> torch.Tensor:
    """Tokens (N, width) of one view (3, H, W), cell by cell."""
    cells = expert.norm(expert.encoder(pixels[None])[0]).view(expert.cells, expert.cells, -1)
    merge, tokens = expert.config.merge_size, []
    for y in range(expert.grid):
        for x in range(expert.grid):
            held = [cells[y * merge + i, x * merge + j] for i in range(merge) for j in range(merge)]
            tokens.append(expert.projector(torch.cat(held)))
    return torch.stack(tokens)


def picture_of(expert, log_depths: torch.Tensor) -> torch.Tensor:
    """Depth (H, W) from the log depths (N, patch * patch) of one view's tokens."""
    patch = expert.config.patch_size
    rows = [
        torch.cat([log_depths[y * expert.grid + x].view(patch, patch) for x in range(expert.grid)], dim=1)
        for y in range(expert.grid)
    ]
    return torch.cat(rows).exp()


def embedded_time(time: torch.Tensor, config) -> torch.Tensor:
    half = config.expert_hidden_size // 2
    share = torch.arange(half, dtype=time.dtype) / (half - 1)
    angles = 2 * math.pi * time / (config.min_period * (config.max_period / config.min_period) ** share)
    return torch.cat([angles.sin(), angles.cos()])


def reference(model, batch: dict, row: int, draw: int) -> dict[str, torch.Tensor]:
    """velocity (chunk, action_dim), its error, the views' depth {slot: (H, W)} and the answer's losses."""
    config, vlm, expert, actor = model.config, model.model.vlm, model.model.depth_expert, model.action_expert
    valid = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row][valid]
    types = batch["token_type_ids"][row][valid] if "token_type_ids" in batch else torch.zeros_like(ids)
    slots = batch["view_mask"][row].nonzero()[:, 0].tolist()
    pixels = batch["pixel_values"][row]
    words = F.embedding(ids, vlm.language_model.embed_tokens.weight) * math.sqrt(config.text_config.hidden_size)
    pictures = [vlm.vision_tower(2 * pixels[slot][None] - 1).last_hidden_state[0] for slot in slots]
    visual = iter(F.linear(torch.cat(pictures), *vlm.multi_modal_projector.linear.parameters()))
    words = torch.stack(
        [next(visual) if id == config.image_token_id else word for id, word in zip(ids, words, strict=True)]
    )
    assert next(visual, None) is None
    streams = [(vlm.language_model, words, torch.arange(len(ids)))]
    kinds = ["answer" if type else "prompt" for type in types]
    if expert is not None:
        number = expert.grid**2
        tokens = torch.cat([depth_tokens_of(expert, pixels[slot]) for slot in slots])
        streams.append((expert.decoder, tokens, torch.cat([slot * number + torch.arange(number) for slot in slots])))
        kinds += ["depth"] * len(tokens)
    time, noise, actions = batch["time"][row, draw], batch["noise"][row, draw], batch["actions"][row]
    noisy = actor.action_in_proj(time * noise + (1 - time) * actions)
    merged = torch.cat([noisy, embedded_time(time, config).expand(len(noisy), -1)], dim=1)
    chunk = actor.action_time_mlp_out(F.silu(actor.action_time_mlp_in(merged)))
    own = torch.cat([actor.state_proj(batch["state"][row]), chunk])
    streams.append((actor.transformer, own, int((types == 0).sum()) + torch.arange(len(own))))
    kinds += ["state"] * config.state_history + ["action"] * config.chunk_size
    hidden, *middle, acting = one_attention(streams, dense_mask(kinds, config.mask == "full"))
    found = {"velocity": actor.action_out_proj(acting[config.state_history :])}
    found["action_loss"] = (found["velocity"] - (noise - actions)).square().mean()
    if expert is not None:
        views = expert.head(middle[0]).split(number)
        found["depth"] = {slot: picture_of(expert, view) for slot, view in zip(slots, views, strict=True)}
    places = types.nonzero()[:, 0]
    chances = (hidden[places - 1] @ model.lm_head.weight.T).log_softmax(-1)
    found["language_losses"] = -chances[torch.arange(len(places)), ids[places]]
    return found


def depth_error(found: torch.Tensor, true: torch.Tensor, share: float) -> torch.Tensor:
    y = (found.log() - true.log())[true > 0]
    return (y.square().mean() - share * y.mean() ** 2 + 1e-6).sqrt()


CASES = {
    "one view": ({}, "left", False),
    "two views, one absent, padded left, two draws": ({"views": ["left", "wrist"], "flow_draws": 2}, "left", False),
    "answers, padded right": ({"views": ["left", "wrist"]}, "right", True),
    "answers, three draws, four cells in a token": ({"flow_draws": 3, "state_history": 2, **MERGED}, "left", True),
    "no depth expert": ({"depth_expert": False, "views": ["left", "wrist"]}, "right", True),
}


@torch.no_grad()
@pytest.mark.parametrize("mask", ["block", "full"])
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_one_attention_over_all_tokens(case, mask):
    options, side, answers = CASES[case]
    model = tiny(**options, mask=mask, language_loss_weight=0.5)
    config, batch = model.config, training_batch(model.config, side, answers=answers)
    with float64_throughout():
        output = model(**batch)
    close = {"atol": 1e-10, "rtol": 1e-10}
    action_losses, language_losses, depth_losses = [], [], []
    for row in range(3):
        for draw in range(config.flow_draws):
            right = reference(model, batch, row, draw)
            torch.testing.assert_close(output.velocity[row, draw], right["velocity"], **close)
            action_losses.append(right["action_loss"])
        language_losses.append(right["language_losses"])  # of any draw: they know nothing of it
        for slot, depth in right.get("depth", {}).items():
            torch.testing.assert_close(output.depth[row, slot], depth, **close)
            depth_losses.append(depth_error(depth, batch["depth_map"][row, slot], config.silog_lambda))
    expected = {"action_loss": torch.stack(action_losses).mean()}
    if answers:
        expected["language_loss"] = torch.cat(language_losses).mean()
    if depth_losses:
        expected["depth_map_loss"] = torch.stack(depth_losses).mean()
    for name, loss in expected.items():
        torch.testing.assert_close(output[name], loss, **close)
    factors = {"action_loss": 1.0, "language_loss": 0.5, "depth_map_loss": 1.0}
    torch.testing.assert_close(output.loss, sum(factors[name] * loss for name, loss in expected.items()), **close)


# ---- what may depend on what, by gradients and by exchange

WITH_PAIR = {"views": ["left", "wrist"]}


def watch_states(transformer, states: list) -> list:
    """Hooks that write the hidden states that enter each layer, and those that leave the last, into `states`."""

    def write(_, inputs):
        states.append(inputs[0])

    norms = [*(layer.input_layernorm for layer in transformer.layers), transformer.norm]
    return [norm.register_forward_pre_hook(write) for norm in norms]


def run_prefix(model, batch: dict) -> tuple:
    """Outputs of `model.model`, and of both streams [VLM, depth] the input tokens and the states at each layer."""
    inner, states = model.model, [[], []]
    hooks = [*watch_states(inner.vlm.language_model, states[0]), *watch_states(inner.depth_expert.decoder, states[1])]
    names = ("input_ids", "pixel_values", "view_mask", "attention_mask", "token_type_ids")
    outputs = inner(**{name: batch[name] for name in names if name in batch}, output_depth=True)
    for hook in hooks:
        hook.remove()
    return outputs, [stream[0] for stream in states], states


def readable(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of the prompts (B, L), and the depth tokens (B, V * 16) of the views that are there."""
    prompt = batch["attention_mask"].bool() & (batch["token_type_ids"] == 0)
    return prompt, batch["view_mask"].repeat_interleave(16, dim=1)


@pytest.mark.parametrize("mask", ["block", "full"])
def test_gradients_of_states_with_respect_to_the_other_stream_s_tokens(mask):
    model = tiny(**WITH_PAIR, mask=mask)
    batch = training_batch(model.config, answers=True)
    outputs, tokens, states = run_prefix(model, batch)
    prompt, present = readable(batch)
    for stream, other in ((0, 1), (1, 0)):
        assert len(states[stream]) == model.config.text_config.num_hidden_layers + 1
        for number, hidden in enumerate(states[stream]):
            own, across = torch.autograd.grad(
                hidden.square().sum(), (tokens[stream], tokens[other]), allow_unused=True, retain_graph=True
            )
            assert own.any()
            if mask == "block" or number == 0:
                assert across is None  # there is no way in the graph, not a number that happens to be 0
            else:
                assert torch.equal(across.any(-1), present if other == 1 else prompt)
    own, across = torch.autograd.grad(outputs.log_depth.sum(), (tokens[1], tokens[0]), allow_unused=True)
    assert own.any(-1)[present].all()
    assert across is None if mask == "block" else torch.equal(across.any(-1), prompt)  # no answer reaches the depth


@pytest.mark.parametrize("mask", ["block", "full"])
def test_actions_read_keys_and_values_of_every_token_of_both_streams_at_every_layer(mask):
    model = tiny(**WITH_PAIR, mask=mask)
    batch = training_batch(model.config, answers=True)
    with torch.no_grad():
        prefix = run_prefix(model, batch)[0].prefix
    prefix = model._prompt_alone(prefix, batch["token_type_ids"])
    assert len(prefix.streams) == (2 if mask == "block" else 1)
    prefix.streams = tuple([tuple(x.requires_grad_() for x in layer) for layer in stream] for stream in prefix.streams)
    state = model.action_expert.state_proj(batch["state"])
    velocity = model.action_expert(prefix, state, batch["noise"], batch["time"])
    expected = torch.cat(readable(batch), dim=1)
    for layer in range(model.config.text_config.num_hidden_layers):
        for part in (0, 1):  # keys, values
            leaves = [stream[layer][part] for stream in prefix.streams]
            gradients = torch.cat(torch.autograd.grad(velocity.sum(), leaves, retain_graph=True), dim=2)
            assert torch.equal(gradients.any(-1).all(1), expected)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["block", "full"])
@pytest.mark.parametrize("changed", ["VLM", "depth expert"])
def test_another_picture_for_one_stream_changes_the_other_by_no_bit(mask, changed):
    model = tiny(torch.float32, **WITH_PAIR, mask=mask)
    batch = training_batch(model.config, dtype=torch.float32)
    towers = {"VLM": model.model.vlm.vision_tower, "depth expert": model.model.depth_expert.encoder.tower}

    def exchange(_, inputs, keywords):
        return inputs, keywords | {"pixel_values": keywords["pixel_values"].flip(-1)}

    _, _, before = run_prefix(model, batch)
    first = model(**batch)
    towers[changed].register_forward_pre_hook(exchange, with_kwargs=True)
    _, _, after = run_prefix(model, batch)
    second = model(**batch)
    mine, other = (0, 1) if changed == "VLM" else (1, 0)
    assert not any(torch.equal(*pair) for pair in zip(before[mine], after[mine], strict=True))
    same = [torch.equal(*pair) for pair in zip(before[other], after[other], strict=True)]
    assert same == [True] + [mask == "block"] * (len(same) - 1)
    assert torch.equal(first.depth, second.depth) == (changed == "VLM" and mask == "block")
    assert not torch.isclose(first.velocity, second.velocity, rtol=0, atol=1e-5).all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize("mask", ["block", "full"])
def test_depth_and_words_know_nothing_of_state_and_actions(mask):
    model = tiny(mask=mask)
    batch = training_batch(model.config, answers=True)
    first = model(**batch, output_depth=True)
    second = model(**batch | {"state": batch["state"] + 1, "actions": batch["actions"] + 1}, output_depth=True)
    assert torch.equal(first.depth, second.depth) and torch.equal(first.logits, second.logits)
    assert not torch.allclose(first.velocity, second.velocity)


# ---- masks


@pytest.mark.parametrize("beside", [None, [[1, 1, 0], [1, 1, 1]]])
def test_prefix_mask_equals_a_loop(beside):
    valid = [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    types = [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]
    mask = joint_mask(torch.tensor(valid), torch.tensor(types), None if beside is None else torch.tensor(beside))
    for row in range(2):
        there = [*valid[row], *([] if beside is None else beside[row])]
        answer = [*types[row], *([0] * (len(there) - 5))]
        for query in range(len(there)):
            for key in range(len(there)):
                causal = query < 5 and answer[query] == 1 and key <= query
                # padding behind an answer may see it: nobody reads padding
                padding = query < 5 and not valid[row][query]
                seen = bool(there[key]) and (not answer[key] or causal)
                assert padding or mask[row, 0, query, key] == seen
