"""Converters: what they refuse, what a full-size release becomes, parts assembled into one model, memory, commands."""

import ast
import json
import os
import pickle
import subprocess
import weakref
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import COMMAND, main
from published_folders import (
    INTERNLM2,
    RELEASE,
    assembly,
    release,
    released_shapes,
    write_internlm2,
    write_parts,
)
from published_weights import internlm2, random_weights, stereovla, timm_tower
from released_miniature import GOLDENS, release_config, write_preprocessor
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaForCausalLM,
    SiglipVisionModel,
)

from stereovla.modeling_stereovla import (
    StereoEncoderModel,
    StereoVLAForActionPrediction,
    convert_depthvla,
    convert_foundationstereo,
    convert_internlm2,
    convert_output,
    convert_parts,
    convert_pi0,
    convert_preprocessor,
    convert_stereovla,
    convert_vision_towers,
)
from stereovla.modeling_stereovla.convert_files import Part, WeightSource, open_weights, plan_conversion
from stereovla.modeling_stereovla.convert_output import outline_model, read_overrides
from stereovla.modeling_stereovla.convert_preprocessor import read_pickle, read_statistics

needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"no recorded tensors at {GOLDENS}")
# ---- the released checkpoint


@needs_goldens
def test_the_writer_of_test_weights_knows_the_published_names():
    rows = [line.split("\t") for line in (GOLDENS / "keys.tsv").read_text().splitlines()]
    shapes = stereovla(
        timm_tower(48, 4, 179, 16),
        timm_tower(32, 3, 128, 16, registers=4),
        internlm2(320, 64, 3, 96, 4, 2, 16),
        internlm2(320, 32, 3, 48, 4, 2, 16),
        {},
        24,
    )
    assert shapes == {key: ast.literal_eval(shape) for key, shape, _ in rows}


@needs_goldens
def test_full_size_release_converts_key_by_key():
    """The paper's sizes, on shapes alone: every key is used, every parameter filled, and the parts have their sizes."""
    lines = (GOLDENS.parent / "foundationstereo" / "foundationstereo_l_keys.tsv").read_text().splitlines()
    stereo = {key: ast.literal_eval(shape) for key, shape, _ in (line.split("\t") for line in lines)}
    shapes = stereovla(
        timm_tower(1152, 27, 4304, 16),
        timm_tower(1024, 24, 4096, 16, registers=4),
        internlm2(92608, 2048, 24, 8192, 16, 8, 128),
        internlm2(92608, 1024, 24, 2048, 16, 8, 128),
        stereo,
        2912,
    )
    source = WeightSource.of("shapes", {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    language = INTERNLM2 | {"vocab_size": 92544, "hidden_size": 2048, "intermediate_size": 8192}
    language |= {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = convert_stereovla.released_config(source, release_config(RELEASE | {"action_token_num": 256}), language)
    model = outline_model(StereoVLAForActionPrediction, config)
    plan_conversion([Part(source, convert_stereovla.released_rules(source, 16, 8))], model.state_dict(), "release")
    assert config.fused_size == 5088 and config.projector_hidden_size == 4 * 5088
    assert config.stereo_config.max_disparity == 416 and config.image_token_id == 92545
    counts = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in {
            "language": model.model.language_model,
            "projector": model.model.visual_tokens.projector,
            "expert": model.action_expert,
        }.items()
    }
    assert 1690 < counts["language"] + model.lm_head.weight.numel() / 1e6 < 1910
    assert 147 < counts["projector"] < 151 and 250 < counts["expert"] < 350


def test_release_becomes_a_folder_with_config_weights_and_statistics(tmp_path):
    options = release(tmp_path / "stereovla", random_weights(released_shapes()))
    folder = convert_stereovla.convert(options)
    model = StereoVLAForActionPrediction.from_pretrained(folder)
    config = model.config
    assert (config.chunk_size, config.state_history, config.pose_dim, config.num_bins) == (5, 4, 7, 64)
    assert (config.action_vocab_size, config.image_token_id, config.text_config.pad_token_id) == (300, 301, 300)
    assert config.text_config.rope_parameters["rope_theta"] == 1e6 and config.time_embedding_dtype == "model"
    assert "AutoModel" in json.loads((folder / "config.json").read_text())["auto_map"]
    assert (folder / "modeling_stereovla.py").is_file() and not list(folder.glob("convert_*"))
    arguments = json.loads((folder / "processor_arguments.json").read_text())
    assert arguments["norm_stats"]["epiclab_franka"]["keyframe_pose"]["q99"] == (np.linspace(0.5, 1, 7) * 3).tolist()
    assert arguments["normalization"] == "quantiles" and arguments["control_rates_hz"] == {"epiclab_franka": 5.0}
    assert [path.name for path in folder.parent.glob(".*")] == []
    with pytest.raises(FileExistsError, match="converted exists"):
        convert_stereovla.convert(options)


def test_all_wrong_keys_are_listed_and_nothing_is_written(tmp_path):
    weights = random_weights(released_shapes())
    del weights["llm.llm.model.layers.1.attention.wqkv.weight"], weights["flow_module.action_out_proj.bias"]
    weights["llm.llm.model.layers.0.attention.wqkv.bias"] = torch.zeros(3)
    weights["backbone_2d.siglip.model.head.weight"] = torch.zeros(3)
    weights["ema.step"] = torch.zeros(1)
    weights["projector.projector.0.bias"] = torch.zeros(5)
    options = release(tmp_path / "stereovla", weights)
    with pytest.raises(ValueError, match="not a released StereoVLA checkpoint of this config") as error:
        convert_stereovla.convert(options)
    message = str(error.value)
    assert "3 unknown published keys: backbone_2d.siglip.model.head.weight, ema.step, llm.llm.model.layers.0" in message
    for name in ("q", "k", "v"):
        assert f"model.language_model.layers.1.self_attn.{name}_proj.weight" in message
    assert (
        "4 parameters of the model that the file lacks" in message and "action_expert.action_out_proj.bias" in message
    )
    assert "1 keys of another shape: model.visual_tokens.projector.layers.0.bias (5,), expected (192,)" in message
    assert not Path(options.out).exists() and list(Path(options.out).parent.glob(".*")) == []


def test_the_stereo_encoder_must_come_from_somewhere(tmp_path):
    options = replace(release(tmp_path / "stereovla", random_weights(released_shapes())), stereo=None)
    with pytest.raises(ValueError, match="proj_cmb.weight is missing"):
        convert_stereovla.convert(options)


def test_other_models_of_the_release_are_refused(tmp_path):
    options = release(tmp_path / "stereovla", random_weights(released_shapes()))
    other = release_config(RELEASE)
    other["model"]["image_keys"] = ["front", "side"]
    other["model"]["model_specific"]["pred"] = "token_pred"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"pred is 'token_pred'.*image_keys is \['front', 'side'\]"):
        convert_stereovla.convert(replace(options, config=str(tmp_path / "other.json")))
    with pytest.raises(ValueError, match="num_heads is 3; it must divide the tower's width, 16"):
        convert_stereovla.convert(replace(options, semantic_heads=3))
    write_preprocessor(
        tmp_path / "six.npz", {key: {"min": -np.ones(6), "max": np.ones(6)} for key in ("proprio", "action", "goal")}
    )
    with pytest.raises(ValueError, match="statistics of 6 state dimensions, the model has 7"):
        convert_stereovla.convert(replace(options, preprocessor=str(tmp_path / "six.npz")))


# ---- the pickle


class Attack:
    """Its pickle calls os.system."""

    def __reduce__(self):
        return os.system, (f"touch {Path.cwd() / 'was_run'}",)


def test_pickle_that_names_anything_else_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_preprocessor(tmp_path / "bad.npz", extra=[Attack(), eval, Path("a")])
    with pytest.raises(ValueError, match="Nothing of it was imported or run") as error:
        read_statistics(tmp_path / "bad.npz")
    for name in (f"{os.system.__module__}.system", "builtins.eval", "pathlib.PosixPath"):
        assert name in str(error.value)
    assert not (tmp_path / "was_run").exists()
    # what is named as inert is a record: it is not looked up, and calling it does nothing
    named = {f"{os.system.__module__}.system", "builtins.eval", "pathlib.PosixPath"}
    statistics, ratio = read_statistics(tmp_path / "bad.npz", convert_preprocessor.INERT | named)
    assert ratio == 0.01 and statistics["epiclab_franka"]["state"]["max"][-1] == 1.0
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays_dicts_and_floats_are_read(tmp_path, protocol):
    content = {"a": np.arange(6.0).reshape(2, 3), "b": {"c": 0.5, "d": np.float64(2)}, "e": [1, "text", None, True]}
    if protocol == 2:  # there numpy writes its bytes through a text codec, a name that is not allowed
        with pytest.raises(ValueError, match="_codecs.encode"):
            (tmp_path / "old.pkl").write_bytes(pickle.dumps(content, protocol=2))
            read_pickle(tmp_path / "old.pkl")
        return
    (tmp_path / "good.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_pickle(tmp_path / "good.pkl")
    assert np.array_equal(found.pop("a"), content.pop("a")) and found == content


def test_damaged_or_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a pickle"):
        read_statistics(tmp_path / "text")
    (tmp_path / "other").write_bytes(pickle.dumps({"stats": 3.0}))
    with pytest.raises(ValueError, match=r"has no 'robot_normalizer'; it has \['stats'\]"):
        read_statistics(tmp_path / "other")
    wrong = {key: {"min": np.zeros((2, 7)), "max": np.ones(7)} for key in ("proprio", "action", "goal")}
    write_preprocessor(tmp_path / "wrong", wrong)
    with pytest.raises(ValueError, match=r"proprio min is float64 of shape \(2, 7\)"):
        read_statistics(tmp_path / "wrong")
    write_preprocessor(tmp_path / "swapped", {key: {"min": np.ones(7), "max": np.zeros(7)} for key in wrong})
    with pytest.raises(ValueError, match="proprio has min"):
        read_statistics(tmp_path / "swapped")


@pytest.mark.parametrize("name", ["../other/a.safetensors", "/etc/passwd", "b/a.safetensors", ".."])
def test_an_index_names_files_beside_it(tmp_path, name):
    (tmp_path / "other").mkdir()
    (tmp_path / "model").mkdir()
    for folder in ("other", "model"):
        save_file({"a": torch.zeros(3)}, tmp_path / folder / "a.safetensors")
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    assert list(open_weights(tmp_path / "model").outlines) == ["a"]
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="valid: names of files in") as error:
        open_weights(tmp_path / "model")
    assert name in str(error.value)


# ---- the parts, each through its own command


def test_fused_attention_weight_is_split_by_key_value_head():
    heads, groups, size, hidden = 2, 3, 4, 5
    named = {f"{kv}{part}": torch.randn(size, hidden) for kv in range(heads) for part in ["q0", "q1", "q2", "k", "v"]}
    fused = torch.cat(list(named.values()))
    query, key, value = convert_internlm2.split_wqkv(fused, heads * groups, heads)
    assert torch.equal(query, torch.cat([named[f"{kv}q{group}"] for kv in range(heads) for group in range(groups)]))
    assert torch.equal(key, torch.cat([named["0k"], named["1k"]]))
    assert torch.equal(value, torch.cat([named["0v"], named["1v"]]))
    with pytest.raises(ValueError, match="wqkv has 40 rows; 5 query and 2 key-value heads"):
        convert_internlm2.split_wqkv(fused, 5, 2)


def test_internlm2_command(tmp_path):
    weights = write_internlm2(tmp_path / "internlm2")
    command = [
        *COMMAND,
        "convert",
        "internlm2",
        "--checkpoint",
        str(tmp_path / "internlm2"),
    ]
    root = Path(__file__).parents[2]
    run = subprocess.run([*command, "--out", str(tmp_path / "llama")], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("wrote "), run.stderr[-2000:]
    model, report = LlamaForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, weights["output.weight"])
    rows = weights["model.layers.0.attention.wqkv.weight"]
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight[8:], rows[-8:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": True}, "bias true"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "dynamic and linear"),
    ],
)
def test_internlm2_configs_that_no_llama_equals_are_refused(change, message):
    config = {name: value for name, value in (INTERNLM2 | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_internlm2.llama_fields(config)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


@torch.no_grad()
def test_assembled_parts_compute_what_they_compute_alone(parts, tmp_path):
    folder = convert_parts.convert(assembly(parts, tmp_path / "assembled"))
    model, report = StereoVLAForActionPrediction.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model.eval()
    # towers: the second-to-last block of the whole towers in transformers
    siglip = convert_vision_towers.Options(
        checkpoint=str(parts / "siglip.safetensors"), out=str(tmp_path / "siglip"), num_heads=2
    )
    whole = {
        "semantic": SiglipVisionModel.from_pretrained(convert_vision_towers.convert(siglip)),
        "spatial": Dinov2WithRegistersModel.from_pretrained(parts / "dino"),
    }
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name, tower in whole.items():
        encoder = getattr(model.model.visual_tokens, name)
        encoder.mean, encoder.std = (0.0,) * 3, (1.0,) * 3
        hidden = tower.eval()(pixels, output_hidden_states=True).hidden_states
        assert len(hidden) == 4  # the embeddings and 3 blocks
        torch.testing.assert_close(encoder(pixels), hidden[-2][:, -256:], atol=1e-5, rtol=1e-5)
    # language model: the converted Llama, of which the vocabulary has grown
    internlm2 = convert_internlm2.Options(checkpoint=str(parts / "language_model"), out=str(tmp_path / "llama"))
    llama = convert_internlm2.convert(internlm2)
    ids = torch.tensor([[1, 5, 9, 200]])
    expected = LlamaForCausalLM.from_pretrained(llama).eval()(ids).logits
    logits = model(input_ids=ids).logits
    assert logits.shape[-1] == 320
    torch.testing.assert_close(logits[..., :300], expected)
    torch.testing.assert_close(logits[..., 300:], expected.mean(-1, keepdim=True).expand(-1, -1, 20), atol=1e-5, rtol=0)
    stereo = load_file(parts / "stereo" / "model.safetensors")
    ours = model.model.visual_tokens.stereo.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in stereo.items())
    # a llama folder as the language model gives the same
    again = convert_parts.convert(assembly(parts, tmp_path / "again", language_model=str(llama)))
    first, second = (load_file(path / "model.safetensors") for path in (folder, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert (model.config.expert_hidden_size, model.config.expert_intermediate_size) == (16, 12)


@torch.no_grad()
def test_assembled_model_acts_and_its_new_parts_depend_on_the_seed(parts, tmp_path):
    folders = [convert_parts.convert(assembly(parts, tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    first, other = (load_file(folder / "model.safetensors") for folder in folders)
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    assert changed and all(key.startswith(("action_expert.", "model.visual_tokens.projector.")) for key in changed)
    # the same variance out as in, as the model's own initialisation has it
    weight = first["model.visual_tokens.projector.layers.0.weight"]
    assert weight.std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    model = AutoModel.from_pretrained(folders[0]).eval()
    config = model.config
    ids = [1] + [config.image_token_id] * 256 + [7, 8, 9]
    chunk = model.predict_action(
        input_ids=torch.tensor([ids]),
        pixel_values=torch.rand(1, 2, 3, 224, 224),
        state=torch.zeros(1, config.state_history, 7),
        num_steps=2,
    )
    assert chunk.shape == (1, 5, 7) and chunk.isfinite().all()


def test_parts_that_do_not_fit_are_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="is a None; valid language models: internlm2, llama"):
        convert_parts.convert(assembly(parts, tmp_path / "a", language_model=str(parts)))
    with pytest.raises(ValueError, match="is a 'internlm2'; valid towers: siglip"):
        convert_parts.convert(assembly(parts, tmp_path / "a", spatial=str(parts / "language_model")))
    with pytest.raises(ValueError, match="neither timm's SigLIP nor its DINOv2"):
        convert_parts.convert(assembly(parts, tmp_path / "a", semantic=str(parts / "stereo" / "model.safetensors")))
    incomplete = tmp_path / "incomplete"
    incomplete.mkdir()
    weights = load_file(parts / "dino" / "model.safetensors")
    del weights["encoder.layer.0.attention.k_proj.weight"]
    save_file(weights, incomplete / "model.safetensors")
    (incomplete / "config.json").write_bytes((parts / "dino" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="lacks 1 keys of a dinov2_with_registers: encoder.layer.0.attention.k_proj"):
        convert_parts.convert(assembly(parts, tmp_path / "a", spatial=str(incomplete)))


def test_position_table_is_resized_as_transformers_does():
    config = Dinov2WithRegistersConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=70, patch_size=14
    )
    embeddings = Dinov2WithRegistersModel(config).embeddings
    torch.nn.init.normal_(embeddings.position_embeddings)
    expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 257, 8), 224, 224)
    table = convert_vision_towers.resize_positions(embeddings.position_embeddings[:, 1:], 16)
    torch.testing.assert_close(table, expected[:, 1:])


@pytest.mark.parametrize("registers", [0, 4])
def test_towers_with_wrong_keys_are_refused(tmp_path, registers):
    weights = random_weights(timm_tower(8, 2, 32, side=4, registers=registers))
    del weights["blocks.1.mlp.fc2.bias"]
    weights |= {"blocks.0.attn.q_norm.weight": torch.zeros(4), "head.weight": torch.zeros(2, 8)}
    save_file(weights, tmp_path / "tower.safetensors")
    with pytest.raises(ValueError, match="2 unknown published keys: blocks.0.attn.q_norm.weight, head.weight; 1 param"):
        convert_vision_towers.convert(
            convert_vision_towers.Options(
                checkpoint=str(tmp_path / "tower.safetensors"), out=str(tmp_path / "out"), num_heads=2
            )
        )
    assert not (tmp_path / "out").exists()


def test_stereo_command_keeps_a_converted_folder_as_it_is(parts, tmp_path):
    options = convert_foundationstereo.Options(
        checkpoint=str(parts / "stereo"), out=str(tmp_path / "out"), dtype="bfloat16"
    )
    model = StereoEncoderModel.from_pretrained(convert_foundationstereo.convert(options))
    assert model.dtype == torch.bfloat16 and model.config.volume_channels == 3


# ---- files and memory


def test_no_more_than_one_shard_is_in_memory(tmp_path):
    shapes = {f"layers.{i}.weight": (64, 64) for i in range(12)}
    state, alive, most = random_weights(shapes), [], []

    def read(key):
        alive[:] = [reference for reference in alive if reference() is not None]
        tensor = state[key].clone()
        alive.append(weakref.ref(tensor))
        most.append(sum(reference().nbytes for reference in alive))
        return tensor

    source = WeightSource("counted", WeightSource.of("counted", state).outlines, read)
    part = Part(source, lambda key, tensor: {key: tensor})
    plan = plan_conversion([part], state, "test")
    size = 64 * 64 * 4
    convert_output.write_shards(tmp_path, plan, torch.float32, max_shard_bytes=3 * size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert index["metadata"]["total_size"] == 12 * size
    assert max(most) <= 4 * size, "a shard, and the last tensor of the one before"
    loaded = open_weights(tmp_path)
    assert loaded.outlines.keys() == state.keys()
    assert all(torch.equal(loaded.read(key), state[key]) for key in state)


def test_sharded_conversion_loads_the_same(tmp_path):
    weights = random_weights(released_shapes())
    whole = convert_stereovla.convert(release(tmp_path / "a", weights))
    many = convert_stereovla.convert(replace(release(tmp_path / "b", weights), max_shard_gb=1e-4))
    assert len(list(many.glob("model-*.safetensors"))) > 3
    first, second = (StereoVLAForActionPrediction.from_pretrained(folder).state_dict() for folder in (whole, many))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_mixed_dtypes_need_a_choice(tmp_path):
    weights = random_weights(released_shapes())
    weights |= {key: value.bfloat16() for key, value in weights.items() if key.startswith("llm.")}
    options = release(tmp_path / "stereovla", weights)
    with pytest.raises(ValueError, match="the weights are bfloat16, float32; choose one dtype"):
        convert_stereovla.convert(options)
    folder = convert_stereovla.convert(replace(options, dtype="bfloat16"))
    assert StereoVLAForActionPrediction.from_pretrained(folder).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'int8'; valid: float32, bfloat16, float16"):
        convert_output.parse_dtype("int8")


def test_two_published_keys_must_not_become_one():
    state = {"a": torch.zeros(1), "b": torch.zeros(1)}
    part = Part(WeightSource.of("test", state), lambda key, tensor: {"c": tensor})
    with pytest.raises(ValueError, match="1 keys that more than one published key becomes: c"):
        plan_conversion([part], {"c": torch.zeros(1)}, "test")


@pytest.mark.parametrize(("text", "words"), [("{", "'{' is no JSON"), ("[8]", "must be a JSON object")])
def test_overrides_are_a_json_object(text, words):
    with pytest.raises(ValueError, match=f"--overrides .*{words}"):
        read_overrides(text)
    assert read_overrides(None) == {} and read_overrides('{"chunk_size": 8}') == {"chunk_size": 8}


def test_files_without_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none of model.safetensors"):
        open_weights(tmp_path)
    torch.save({"weights": torch.zeros(3), "note": "text"}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        open_weights(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "module",
    [
        convert_depthvla,
        convert_foundationstereo,
        convert_internlm2,
        convert_parts,
        convert_pi0,
        convert_stereovla,
        convert_vision_towers,
    ],
)
def test_every_option_of_every_command_is_explained(module, capsys):
    command = ["convert", module.__name__.rpartition(".convert_")[2]]
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert f"stereovla {' '.join(command)} --" in text
    for option in fields(module.Options):
        assert f"--{option.name}" in text and option.metadata["help"]
