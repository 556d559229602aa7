"""Published stereo sets: every format gives the disparity that was written, every sample comes once, errors name it."""

import json
from itertools import islice

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from stereo_sets import make_pair, pfm, png16, save, write_kitti, write_middlebury, write_sceneflow

from stereovla.dataset_builder.formats.disparity_sets import decode_disparity, open_pairs, pair_files
from stereovla.dataset_builder.formats.labelled_sets import SampleStream
from stereovla.dataset_builder.formats.pixel_maps import decode_view
from stereovla.dataset_builder.streaming.lanes import merge_states

COLUMNS = ("left", "right", "disparity")


def opened(folder, form, split="train", held_out=0.25, columns=COLUMNS, unit=1.0):
    return open_pairs([str(folder)], form, split, held_out, columns, unit)


def test_pfm_is_read_from_the_bottom_up_in_both_byte_orders():
    """Bytes written by hand: 2 x 2, the lower row first; 1.0 is 3f800000."""
    little = b"Pf\n2 2\n-0.003921568859\n" + bytes.fromhex("0000803f 00000040 0000c07f 0000807f")  # 1, 2; NaN, inf
    big = b"Pf\n2 2\n1.0\n" + bytes.fromhex("3f800000 40000000 7fc00000 7f800000")
    for data in (little, big):
        assert decode_disparity(data, 1.0, "x").tolist() == [[0, 0], [1, 2]]
    assert decode_disparity(pfm(np.array([[-3.0, 1.0]])), 0.5, "x").tolist() == [[0, 0.5]]


def test_kitti_png_holds_256_steps_per_px_and_0_for_unknown():
    values = np.array([[0, 1, 256], [300, 65535, 2]], np.uint16)
    expected = values.astype(np.float64) / 256
    np.testing.assert_array_equal(decode_disparity(png16(values), 1 / 256, "x"), expected)


def test_what_is_no_disparity_or_view_is_refused():
    with pytest.raises(ValueError, match="a.pfm, 8 bytes, is no disparity: its header"):
        decode_disparity(b"Pf\n9 9\n1", 1.0, "a.pfm")
    with pytest.raises(ValueError, match="a.pfm, .* it has 12 bytes of numbers; 2 x 2 need 4 each"):
        decode_disparity(pfm(np.ones((2, 2)))[:-4], 1.0, "a.pfm")
    with pytest.raises(ValueError, match="a.png has no positive disparity.*unit 1.0"):
        decode_disparity([[-2.0, 0.0]], 1.0, "a.png")
    with pytest.raises(ValueError, match=r"a is float64 \(3,\); expected numbers \(height, width\)"):
        decode_disparity([1.0, 2.0, 3.0], 1.0, "a")
    with pytest.raises(ValueError, match="a.png.*mode is I;16"):
        decode_view(png16(np.ones((2, 2), np.uint16)), "a.png")


@pytest.mark.parametrize("form, write", [("kitti2015", write_kitti), ("middlebury", write_middlebury)])
def test_layouts_give_what_was_written_and_hold_out_the_last(form, write, tmp_path):
    folder = write(tmp_path, 8)
    train, held_out = opened(folder, form), opened(folder, form, "validation")
    assert (len(train), len(held_out)) == (6, 2)
    for number in range(8):
        pair = train[number] if number < 6 else held_out[number - 6]
        left, right, disparity = make_pair(number)
        if form == "middlebury":
            disparity[:2] = 0
        np.testing.assert_array_equal(pair["left"], left)
        np.testing.assert_array_equal(pair["right"], right)
        np.testing.assert_array_equal(pair["disparity"], disparity)


def test_sceneflow_has_two_renderings_of_each_disparity(tmp_path):
    folder = write_sceneflow(tmp_path, 3)
    files = pair_files(folder, "sceneflow")
    assert len(files) == 6 and len({disparity for *_, disparity in files}) == 3
    train, held_out = opened(folder, "sceneflow"), opened(folder, "sceneflow", "validation")
    assert (len(train), len(held_out)) == (4, 2)  # both renderings of the last
    for pair, seed in ((train[3], 1), (held_out[0], 2)):
        np.testing.assert_array_equal(pair["disparity"], make_pair(seed)[2])
        np.testing.assert_array_equal(pair["right"], make_pair(seed)[1])


@pytest.mark.parametrize("kind", ["image", "bytes", "numbers"])
def test_columns_of_a_dataset(kind, tmp_path):
    pairs = [make_pair(seed, 48) for seed in range(4)]
    encode = {
        "image": (Image(), lambda d: {"bytes": png16((d * 256).astype(np.uint16)), "path": None}, 1 / 256),
        "bytes": (Value("binary"), pfm, 1.0),
        "numbers": (List(List(Value("float32"))), lambda d: d.tolist(), 1.0),
    }
    feature, function, unit = encode[kind]
    features = Features({"im_l": Image(), "im_r": Image(), "disp": feature})
    rows = [{"im_l": left, "im_r": right, "disp": function(disparity)} for left, right, disparity in pairs]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    columns = ("im_l", "im_r", "disp")
    train = opened(tmp_path, "columns", columns=columns, unit=unit)
    held_out = opened(tmp_path, "columns", "validation", columns=columns, unit=unit)
    assert (len(train), len(held_out)) == (3, 1)
    for pair, (left, right, disparity) in zip([*train, held_out[0]], pairs, strict=True):
        np.testing.assert_array_equal(pair["left"], left)
        np.testing.assert_array_equal(pair["right"], right)
        np.testing.assert_array_equal(pair["disparity"], disparity)
    with pytest.raises(ValueError, match="has no column left, right, disparity; it has: im_l, im_r, disp"):
        opened(tmp_path, "columns")


def test_a_datasets_own_validation_split_is_held_out(tmp_path):
    features = Features({"left": Image(), "right": Image(), "disparity": List(List(Value("float32")))})
    for split, seeds in (("train", range(3)), ("validation", range(7, 9))):
        rows = [dict(zip(COLUMNS, (*make_pair(s, 48)[:2], make_pair(s, 48)[2].tolist()), strict=True)) for s in seeds]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    train, held_out = opened(tmp_path, "columns"), opened(tmp_path, "columns", "validation")
    assert (len(train), len(held_out)) == (3, 2)
    np.testing.assert_array_equal(held_out[0]["left"], make_pair(7, 48)[0])


def test_broken_sets_are_named(tmp_path):
    folder = write_kitti(tmp_path / "kitti", 3)
    with pytest.raises(ValueError, match="has no file frames_.*is it a folder of sceneflow"):
        opened(folder, "sceneflow")
    with pytest.raises(ValueError, match="has 3 samples; with 0.9 of them held out none is left"):
        opened(folder, "kitti2015", held_out=0.9)
    save(folder / "training" / "image_3" / "000001_10.png", make_pair(0, 48)[1])
    with pytest.raises(ValueError, match=r"000001_10.png: sizes.*left \(64, 64\), right \(48, 48\), disparity \(64"):
        opened(folder, "kitti2015")[1]
    (folder / "training" / "disp_occ_0" / "000001_10.png").unlink()
    with pytest.raises(ValueError, match="lacks 1 files of kitti2015, the first is .*disp_occ_0/000001_10.png"):
        opened(folder, "kitti2015")


class Numbers:
    """Pairs that are told apart by their number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"number": index}


def test_every_pair_comes_once_per_epoch_each_time_in_another_order():
    samples = list(islice(SampleStream(Numbers(11), seed=3), 33))
    epochs = [[sample["number"] for sample in samples[start : start + 11]] for start in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])
    assert len({sample["seed"] for sample in samples}) == 33


def test_processes_share_the_pairs_and_others_go_on():
    whole = [(s["number"], s["seed"]) for s in islice(SampleStream(Numbers(11), seed=3), 32)]
    seen, states = [], []
    for rank in range(2):
        stream = SampleStream(Numbers(11), seed=3, rank=rank, world_size=2)
        seen += [(s["number"], s["seed"]) for s in islice(stream, 8)]
        states.append(json.loads(json.dumps(stream.state_dict())))
    assert sorted(seen) == sorted(whole[:16])
    alone = SampleStream(Numbers(11), seed=3)
    alone.load_state_dict(merge_states(states))
    assert [(s["number"], s["seed"]) for s in islice(alone, 16)] == whole[16:]
    with pytest.raises(ValueError, match="the saved stream has samples=11, this one samples=12"):
        SampleStream(Numbers(12), seed=3).load_state_dict(states[0])
