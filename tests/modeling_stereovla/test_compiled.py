"""`predict_action` as one graph: no breaks, nothing read by the host, nothing copied from it, and the same chunks."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from tiny_depthvla import float64_throughout, prompts, training_batch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter

from stereovla.modeling_stereovla import (
    DepthVLAConfig,
    DepthVLAForActionPrediction,
    StereoVLAConfig,
    StereoVLAForActionPrediction,
)

# InternLM2's rotary embedding, and no more layers and steps than there are kinds of them: a graph unrolls them all
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
FEW = {"text_config": {"num_hidden_layers": 1, "rope_parameters": ROPE}, "num_inference_steps": 2}
DEPTHVLA = {"num_inference_steps": 2}


def stereovla(preset: str = "tiny", **options) -> StereoVLAForActionPrediction:
    torch.manual_seed(0)
    return StereoVLAForActionPrediction(StereoVLAConfig.from_preset(preset, **{**FEW, **options})).eval()


def depthvla(**options) -> DepthVLAForActionPrediction:
    torch.manual_seed(0)
    return DepthVLAForActionPrediction(DepthVLAConfig.from_preset("depthvla-tiny", **{**DEPTHVLA, **options})).eval()


def stereo_inputs(config, rows: int = 2, words: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 500, (rows, 1 + config.num_image_tokens + words), generator=generator)
    ids[:, 1 : 1 + config.num_image_tokens] = config.image_token_id
    size = config.image_size
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.rand(rows, 2, 3, size, size, generator=generator),
        "state": torch.randn(rows, config.state_history, config.state_dim, generator=generator),
        "noise": torch.randn(rows, config.chunk_size, config.action_dim, generator=generator),
    }
    if config.turn_symmetry:
        inputs["facing"] = torch.rand(rows, config.num_turns, generator=generator)
    if config.points_frame is not None:
        inputs["point_transform"] = torch.randn(rows, 4, 4, generator=generator)
        inputs["point_frame"] = torch.tensor([2, 0])[:rows]
    return inputs


def depth_inputs(config, side: str = "none") -> dict[str, torch.Tensor]:
    inputs = prompts(config, side, torch.float32, rows=2)
    inputs["noise"] = torch.randn(2, config.chunk_size, config.action_dim, generator=torch.Generator().manual_seed(1))
    return inputs


def running(config, length: int = 6) -> torch.Tensor:
    actions = torch.randn(2, config.chunk_size, config.action_dim, generator=torch.Generator().manual_seed(2))
    actions[:, length:] = float("nan")
    return actions


def padded(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With one more place on the left, which the second sample uses."""
    ids = torch.cat([inputs["input_ids"][:, :1], inputs["input_ids"]], dim=1)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    return inputs | {"input_ids": ids, "attention_mask": mask}


def case(name: str):
    """(model, inputs of `predict_action`)."""
    if name.startswith("depthvla"):
        options = {"depthvla, mask full": {"mask": "full"}, "depthvla, mono": {"depth_expert": False}}.get(name, {})
        model = depthvla(**options)
        return model, depth_inputs(model.config, "left" if name == "depthvla, padded, a view absent" else "none")
    if name == "points":
        model = stereovla("points")
        return model, stereo_inputs(model.config) | {"chain_of_thought": False}
    options = {"given": {"max_delay": 3}, "both views": {"stereo_config": None, "right_view": "separate"}}
    options["left-right attention"] = {"stereo_config": None, "right_view": "attention"}
    model = stereovla(**options.get(name, {}))
    inputs = stereo_inputs(model.config) | {"chain_of_thought": name.startswith("pose")}
    if name.endswith("padded"):
        inputs = padded(inputs)
    if name in ("given", "guided"):
        inputs |= {"running_actions": running(model.config), "delay": torch.tensor([2, 1])}
    return model, inputs


CASES = [
    "pose",
    "direct",
    "direct, padded",
    "pose, padded",
    "given",
    "guided",
    "points",
    "both views",
    "left-right attention",
    "depthvla",
    "depthvla, padded, a view absent",
    "depthvla, mask full",
    "depthvla, mono",
]


def with_fast(fast: str) -> list:
    """All cases, of which one is fast enough for every run."""
    return [fast, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != fast)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", with_fast("pose"))
def test_predict_action_is_one_graph(name):
    """Where nothing is rearranged, the same operations, to the bit."""
    model, inputs = case(name)
    expected, counter = model.predict_action(**inputs), CompileCounter()
    compiled = torch.compile(model.predict_action, fullgraph=True, backend=counter)(**inputs)
    assert counter.frame_count == 1
    if name == "depthvla, padded, a view absent":  # which a graph looks at too, in another batch
        torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-4)
    else:
        assert torch.equal(compiled, expected)


@pytest.mark.parametrize("name", with_fast("depthvla"))
def test_a_device_waits_for_nothing(name, monkeypatch):
    """On a device without values: no operation reads one, and none is computed on the host, as CUDA graphs want it."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())  # which "meta" has not
    model, inputs = case(name)
    model.to("meta")
    inputs = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    nodes = []

    def record(graph, example_inputs):
        nodes.extend(graph.graph.nodes)
        return make_boxed_func(graph.forward)

    chunk = torch.compile(model.predict_action, fullgraph=True, backend=aot_autograd(fw_compiler=record))(**inputs)
    assert chunk.shape == inputs["noise"].shape and len(nodes) > 500
    values = [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert {value.device.type for value in values} == {"meta"}
    assert not any(word in str(node.target) for node in nodes for word in ("nonzero", "_local_scalar", "masked_select"))


@pytest.mark.slow
@pytest.mark.parametrize(("options", "graphs"), [({}, [1, 1, 2, 2]), ({"dynamic": False}, [1, 2])])
def test_prompts_and_batches_that_vary_share_a_graph(options, graphs):
    """A batch of one has its own."""
    model, counter, made = stereovla(), CompileCounter(), []
    sizes = ((2, 6), (3, 9), (1, 6), (1, 8))[: len(graphs)]
    kinds = [stereo_inputs(model.config, rows, words) for rows, words in sizes]
    expected = [model.predict_action(**inputs, chain_of_thought=False) for inputs in kinds]
    model.compile_predict_action(backend=counter, **options)
    for inputs, chunk in zip(kinds, expected, strict=True):
        assert torch.equal(model.predict_action(**inputs, chain_of_thought=False), chunk)
        made.append(counter.frame_count)
    assert made == graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stereovla", "depthvla"])
def test_a_training_step_breaks_where_its_targets_are_found_alone(name):
    if name == "stereovla":
        model = stereovla().train()
        inputs = stereo_inputs(model.config)
        labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 20, -100)
        inputs |= {"labels": labels, "is_action": torch.tensor([False, True])}
        del inputs["noise"]
    else:
        model = depthvla().train()
        inputs = training_batch(model.config, dtype=torch.float32, answers=True)
        inputs["is_action"] = torch.tensor([True, False, True])
    inputs["actions"] = torch.randn(len(inputs["state"]), model.config.chunk_size, model.config.action_dim)
    found = torch._dynamo.explain(model)(**inputs)
    breaks = {(Path(reason.user_stack[-1].filename).name, reason.user_stack[-1].name) for reason in found.break_reasons}
    assert breaks == {("objectives.py", "__post_init__")}
    sizes = sorted(len(graph.graph.nodes) for graph in found.graphs)
    assert sizes[-1] > 300 and sum(sizes[:-1]) < 30  # one graph of all, and what finds targets


def in_float64(name: str) -> torch.Tensor:
    """The chunk of a case with weights and inputs in float64."""
    model, inputs = case(name)
    doubled = {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    with float64_throughout():
        return model.double().predict_action(**doubled)


@pytest.mark.parametrize("name", ["points", "guided"])
def test_plain_chunks_are_exact(name):
    model, inputs = case(name)
    expected = in_float64(name)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(model.predict_action(**inputs).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pose", "points", "guided", "given", "depthvla, padded, a view absent"])
def test_compiled_chunks_are_as_exact_as_others(name):
    """Against the same weights in float64: kernels that were written anew round elsewhere, but no more."""
    model, inputs = case(name)
    expected, plain = in_float64(name), model.predict_action(**inputs)
    model.compile_predict_action()
    compiled = model.predict_action(**inputs)
    errors = [(chunk.double() - expected).abs().max() for chunk in (plain, compiled)]
    rounding = torch.finfo(torch.float32).eps * expected.abs().max()
    assert errors[1] < 4 * max(errors[0], rounding) and errors[0] < 1e-4


def test_what_is_wrong_is_told_before_the_graph(monkeypatch):
    """With its values, by `compile_predict_action` as by the plain one."""
    model = stereovla(max_delay=3)
    inputs = stereo_inputs(model.config) | {"chain_of_thought": False}
    ids = inputs["input_ids"].clone()
    ids[1, 3] = 7
    few = model.config.num_image_tokens - 1
    late = {"running_actions": running(model.config), "delay": torch.tensor([2, 7])}
    calls, compiled = [], stereovla(max_delay=3)
    compiled.compile_predict_action(backend=CompileCounter())
    monkeypatch.setattr(compiled, "_act", lambda *arguments, **given: calls.append(given))
    for one in (model, compiled):
        with pytest.raises(ValueError, match=rf"input_ids hold \[{few + 1}, {few}\] image tokens .* each row needs"):
            one.predict_action(**inputs | {"input_ids": ids})
        with pytest.raises(ValueError, match=r"delay is \[2, 7\]; it must be whole steps .* has, \[6, 6\]"):
            one.predict_action(**inputs, **late)
    assert not calls


@pytest.mark.slow
def test_what_is_wrong_is_told_inside_a_graph():
    """Which can name the rule alone."""
    model = stereovla(max_delay=3)
    inputs = stereo_inputs(model.config) | {"chain_of_thought": False}
    ids = inputs["input_ids"].clone()
    ids[1, 3] = 7
    late = {"running_actions": running(model.config), "delay": torch.tensor([2, 7])}
    inside = torch.compile(model.predict_action, fullgraph=True, backend="eager")
    for wrong, rule in [
        ({"input_ids": ids}, "each row of input_ids needs 16 image tokens"),
        (late, "delay is wrong; it must be whole steps"),
        (late | {"delay": torch.tensor([2, 4])}, r"takes delays up to config\.max_delay"),
    ]:
        with pytest.raises(RuntimeError, match=rule):
            inside(**inputs | wrong)


def test_what_values_decide_is_decided_before_the_graph(monkeypatch):
    """No mask where nothing is padded, noise of the generator or of torch's own, given or guided by the delay."""
    model, seen = stereovla(max_delay=3), []
    monkeypatch.setattr(model, "_act", lambda begin, *_, **shown: seen.append((begin, shown["attention_mask"])))
    inputs = stereo_inputs(model.config)
    noise, masked = inputs.pop("noise"), padded(inputs)
    for given in (masked, masked | {"attention_mask": torch.ones_like(masked["input_ids"])}):
        model.predict_action(**given, generator=torch.Generator().manual_seed(4))
    drawn = torch.randn(noise.shape, generator=torch.Generator().manual_seed(4))
    assert [mask is None for _, mask in seen] == [False, True]
    assert all(torch.equal(begin.noise, drawn) for begin, _ in seen)
    torch.manual_seed(4)
    model.predict_action(**inputs)
    assert torch.equal(seen[-1][0].noise, drawn)
    for delay, guide in ((3, False), (4, True), (torch.tensor([3, 1]), False), (torch.tensor([0, 4]), True)):
        model.predict_action(**inputs, running_actions=running(model.config), delay=delay)
        assert seen[-1][0].guide == guide
