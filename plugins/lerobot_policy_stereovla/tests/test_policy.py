"""A policy of the plugin computes what the model and its processor compute by themselves, and refuses in words."""

import json
import shutil

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.rollout.inference.sync import SyncInferenceEngine
from lerobot_policy_stereovla import DepthVLAConfig, StereoVLAConfig
from written_data import VIEWS, batch_of, dataset_for

from stereovla.modeling_stereovla import DepthVLAForActionPrediction, StereoVLAForActionPrediction
from stereovla.processing import DepthVLAProcessor, StereoProcessor

KINDS = {
    "stereovla": (StereoVLAConfig, StereoVLAForActionPrediction, StereoProcessor),
    "depthvla": (DepthVLAConfig, DepthVLAForActionPrediction, DepthVLAProcessor),
}
ROWS = [0, 2, 6, 8, 17]  # the first and the last of an episode among them: histories and chunks are filled up


def config_of(kind, model, **fields):
    # chain_of_thought is a StereoVLA's; of a DepthVLA it says nothing
    given = {"views": dict(VIEWS), "device": "cpu", "run_code": True, "chain_of_thought": False, "push_to_hub": False}
    return KINDS[kind][0](pretrained_model=str(model), **{**given, **fields})


def new_policy(kind, model, **fields):
    """(policy, its pipelines, its dataset) as lerobot-train makes them."""
    config = config_of(kind, model, **fields)
    dataset = dataset_for(config)
    policy = make_policy(config, ds_meta=dataset.meta)
    return policy, make_pre_post_processors(config, dataset_stats=dataset.meta.stats), dataset


def pictures_of(dataset, row):
    """uint8 arrays by view, of the present frame."""
    sample = dataset[row]
    found = {view: sample[key] for view, key in VIEWS.items()}
    return {view: (of[-1] if of.ndim == 4 else of).permute(1, 2, 0).numpy() for view, of in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_models(models, kind):
    policy, (before, _), dataset = new_policy(kind, models[kind])
    model, processor = (of.from_pretrained(models[kind]) for of in KINDS[kind][1:])
    chunk = model.config.chunk_size
    noise = torch.randn(len(ROWS), model.config.flow_draws, chunk, 7, generator=torch.Generator().manual_seed(0))
    time = torch.linspace(0.1, 0.9, len(ROWS))[:, None].expand(-1, model.config.flow_draws)
    samples = [dataset[row] for row in ROWS]
    assert samples[0]["action_is_pad"].any() and samples[2]["action_is_pad"].sum() == chunk - 1  # of the data

    policy.train()
    model.train()
    found, parts = policy(before(batch_of(dataset, ROWS)), noise=noise, time=time)
    inputs = processor(
        images=[pictures_of(dataset, row) for row in ROWS],
        text=[sample["task"] for sample in samples],
        state=[sample["observation.state"].numpy().reshape(-1, 7) for sample in samples],
        embodiment="franka_panda",
        actions=[sample["action"].numpy() for sample in samples],
        action_mask=[~sample["action_is_pad"].numpy() for sample in samples],
    )
    draws = {"noise": noise, "time": time}
    if kind == "stereovla":
        draws["hide_pose"] = torch.zeros(len(ROWS), dtype=torch.bool)
    wanted = model(**inputs, **draws)
    assert torch.equal(found, wanted.loss)  # the same arithmetic on the same numbers
    assert parts["action_loss"] == wanted.action_loss.item() > 0

    found.backward()
    wanted.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_actions_are_the_models(models, kind):
    """Step by step, with the states so far as history and two actions of each chunk executed."""
    policy, (before, after), dataset = new_policy(kind, models[kind], n_action_steps=2)
    policy.eval()
    model, processor = (of.from_pretrained(models[kind]) for of in KINDS[kind][1:])
    model.eval()
    shape = (1, model.config.chunk_size, 7)
    noises = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    states = []
    for step in range(6):
        sample, pictures = dataset[step], pictures_of(dataset, step)
        states.append(sample["observation.state"].reshape(-1, 7)[-1])
        seen = {key: torch.from_numpy(pictures[view]).permute(2, 0, 1)[None] / 255 for view, key in VIEWS.items()}
        batch = before({**seen, "observation.state": states[-1][None], "task": [sample["task"]]})
        action = after(policy.select_action(batch, noise=noises[step // 2]))
        if step % 2 == 0:
            history = torch.stack(states[-model.config.state_history :]).numpy()
            inputs = processor(pictures, sample["task"], history, "franka_panda", check_stereo=False)
            chunk = processor.decode_actions(
                model.predict_action(**inputs, noise=noises[step // 2], **_direct(kind)), "franka_panda"
            )
        np.testing.assert_array_equal(action.numpy(), chunk[:, step % 2])
    policy.reset()
    again = policy.predict_action_chunk(batch, noise=noises[0])
    inputs = processor(pictures, sample["task"], states[-1].numpy(), "franka_panda", check_stereo=False)
    wanted = processor.decode_actions(model.predict_action(**inputs, noise=noises[0], **_direct(kind)), "franka_panda")
    np.testing.assert_array_equal(again.numpy(), wanted)  # the history was forgotten


def _direct(kind):
    return {"chain_of_thought": False} if kind == "stereovla" else {}


def test_lerobots_rollouts_get_the_models_actions(models):
    """`lerobot-rollout` and recording with a policy: what a robot's cameras give, without a batch."""
    policy, (before, after), dataset = new_policy("stereovla", models["stereovla"])
    names = dataset.meta.features["action"]["names"]
    engine = SyncInferenceEngine(
        policy=policy.eval(),
        preprocessor=before,
        postprocessor=after,
        dataset_features=dataset.meta.features,
        ordered_action_keys=names[::-1],
        task="pick up the cup",
        device="cpu",
        robot_type="test_arm",
    )
    pictures, state = pictures_of(dataset, 0), dataset[0]["observation.state"].reshape(-1, 7)[-1].numpy()
    torch.manual_seed(0)
    seen = {key: pictures[view].copy() for view, key in VIEWS.items()}
    action = engine.get_action({**seen, "observation.state": state.copy()})
    torch.manual_seed(0)
    wanted = policy.processor.decode_actions(
        policy.model.predict_action(
            **policy.processor(pictures, "pick up the cup", state, "franka_panda"), noise=torch.randn(1, 8, 7)
        ),
        "franka_panda",
    )
    np.testing.assert_array_equal(action.numpy(), wanted[0, 0, ::-1])


def test_a_saved_policy_is_the_same(models, tmp_path):
    policy, (before, after), dataset = new_policy("stereovla", models["stereovla"])
    policy.save_pretrained(tmp_path / "policy")
    for pipeline in (before, after):
        pipeline.save_pretrained(tmp_path / "policy")
    config = PreTrainedConfig.from_pretrained(tmp_path / "policy", cli_overrides=["--run_code=true", "--device=cpu"])
    config.pretrained_path = tmp_path / "policy"
    loaded = make_policy(config, ds_meta=dataset.meta)
    before_too, _ = make_pre_post_processors(config, pretrained_path=str(tmp_path / "policy"))
    noise = torch.randn(len(ROWS), 8, 7)
    batch = batch_of(dataset, ROWS)
    first = policy.eval().predict_action_chunk(before(batch), noise=noise)
    assert torch.equal(first, loaded.predict_action_chunk(before_too(batch), noise=noise))
    assert not loaded.training
    code = {path.name: path.read_bytes() for path in models["stereovla"].glob("*.py")}
    assert code == {path.name: path.read_bytes() for path in (tmp_path / "policy/model").glob("*.py")}


def test_a_new_robot_brings_its_statistics(models, tmp_path):
    policy, (before, _), dataset = new_policy("stereovla", models["stereovla"], embodiment="test_arm")
    stats = dataset.meta.stats
    of_robot = policy.processor.norm_stats["test_arm"]
    for key, name in (("state", "observation.state"), ("action", "action"), ("keyframe_pose", "observation.state")):
        for number in ("min", "max", "mean", "std", "q01", "q99"):
            assert of_robot[key][number] == pytest.approx(np.ravel(stats[name][number]).tolist())
    assert policy.processor.control_rates_hz["test_arm"] == 12
    assert policy.processor.state_names["test_arm"] == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert "franka_panda" in policy.processor.norm_stats  # beside what it knew
    policy(before(batch_of(dataset, ROWS)))
    policy.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model/processor_config.json").read_text())
    assert saved["norm_stats"]["test_arm"] == of_robot
    assert json.loads((tmp_path / "config.json").read_text())["robot"]["action"] == of_robot["action"]


def test_code_is_run_only_where_the_user_says_so(models, tmp_path):
    config = config_of("stereovla", models["stereovla"], run_code=False)
    dataset = dataset_for(config)
    with pytest.raises(ValueError, match=r"brings Python code .*modeling_stereovla\.py.*--policy.run_code=true"):
        make_policy(config, ds_meta=dataset.meta)
    policy, _, _ = new_policy("stereovla", models["stereovla"])
    policy.save_pretrained(tmp_path / "policy")
    path = tmp_path / "policy/config.json"
    saved = json.loads(path.read_text())
    assert saved["run_code"] is False  # although it was said
    path.write_text(json.dumps({**saved, "run_code": True}))
    config = PreTrainedConfig.from_pretrained(tmp_path / "policy")
    config.pretrained_path = tmp_path / "policy"
    with pytest.raises(ValueError, match=r"config\.json says run_code itself"):
        make_policy(config, ds_meta=dataset.meta)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("stereovla", {"views": {"left": "observation.images.left"}}, r"has the cameras observation.images.eye_a, "),
        ("stereovla", {"views": {"left": VIEWS["left"]}}, r"views are left, but the model sees left, right"),
        ("stereovla", {"n_action_steps": 0}, r"n_action_steps is 0; it must be from 1 to chunk_size \(8\)"),
        ("stereovla", {"n_action_steps": 9}, r"n_action_steps is 9; it must be from 1 to chunk_size \(8\)"),
        ("stereovla", {"chunk_size": 4}, r"chunk_size is 4, but the model's is 8"),
        ("stereovla", {"weights_dtype": "float8"}, r"weights_dtype is 'float8'; valid: float32, bfloat16, float16"),
        ("stereovla", {"freeze": ["nose"]}, r"cannot freeze nose; this model has semantic"),
        ("depthvla", {"pretrained_model": "stereovla"}, r"is a 'stereovla'; --policy.type=depthvla needs a 'depthvla'"),
    ],
)
def test_what_cannot_be_is_refused(models, kind, fields, message):
    if "pretrained_model" in fields:
        fields = {"pretrained_model": str(models[fields["pretrained_model"]])}
    with pytest.raises(ValueError, match=message):
        config = KINDS[kind][0](
            **{"pretrained_model": str(models[kind]), "views": dict(VIEWS), "device": "cpu", "run_code": True, **fields}
        )
        make_policy(config, ds_meta=dataset_for(config).meta)


def test_keyframes_are_not_learned_from_data_without(models):
    policy, (before, _), dataset = new_policy("stereovla", models["stereovla"], chain_of_thought=None)
    assert policy.model.config.chain_of_thought  # the model's own
    policy.train()
    with pytest.raises(ValueError, match=r"no keyframes .* --policy.chain_of_thought=false"):
        policy(before(batch_of(dataset, ROWS)))
    policy.eval().predict_action_chunk(before(batch_of(dataset, ROWS)))  # it acts as it was trained


def test_weights_that_are_missing_are_not_drawn_silently(models, tmp_path):
    bare = shutil.copytree(models["stereovla"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=r"has no weights; say --policy.untrained=true"):
        new_policy("stereovla", bare)
    torch.manual_seed(3)
    policy, (before, _), dataset = new_policy("stereovla", bare, untrained=True)
    assert policy(before(batch_of(dataset, ROWS)))[0].isfinite()
    torch.manual_seed(3)
    again, _, _ = new_policy("stereovla", models["stereovla"], untrained=True)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))


def test_pictures_are_seen_as_they_are(models):
    _, (before, _), dataset = new_policy("stereovla", models["stereovla"])
    batch = before(batch_of(dataset, ROWS))
    for row, number in enumerate(ROWS):
        for view, picture in pictures_of(dataset, number).items():
            assert np.array_equal(batch[VIEWS[view]][row].permute(1, 2, 0).numpy(), picture)
    wrong = batch_of(dataset, ROWS)
    wrong[VIEWS["left"]] = wrong[VIEWS["left"]] * 255
    with pytest.raises(ValueError, match=r"has values from .* expected 0 to 1"):
        before(wrong)


def test_code_that_is_older_says_so(models, tmp_path):
    folder = shutil.copytree(models["stereovla"], tmp_path / "old")
    code = folder / "policy_processor.py"
    text = code.read_text(encoding="utf-8")
    assert "def decode_actions(" in text
    code.write_text(text.replace("def decode_actions(", "def _decode_actions("), encoding="utf-8")
    with pytest.raises(ValueError, match=r"older than this plugin: it lacks processor\.decode_actions; save it anew"):
        new_policy("stereovla", folder)
