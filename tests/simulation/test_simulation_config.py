"""The world's config: presets, ranges, and errors that name the limit and what is valid; and its guide."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from stereovla.simulation.config import LIMITS, PRESETS, WorldConfig


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_survive_json(preset):
    config = WorldConfig.from_preset(preset, image_size=64)
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert WorldConfig.from_preset("default", **saved) == config
    assert {name: len(getattr(config, name)) for name in LIMITS} == dict.fromkeys(LIMITS, 2)


def test_easy_is_the_demos_world():
    config = WorldConfig.from_preset("easy")
    assert config.tasks == ("pick",) and config.objects == ("cube", "ball", "can", "bar")
    assert config.keyframes == ("grasp", "lift") and config.wording == "full"
    assert config.fovy_deg == (45.0, 45.0) and config.baseline_m == (0.063, 0.063)
    for name in ("noise_std", "vertical_misalignment_px", "right_offset"):
        assert getattr(config, name) == (0.0, 0.0)


def test_changes_come_after_the_preset():
    config = WorldConfig.from_preset("geometry", support_share=0.1, tasks=["pick"], fovy_deg=50)
    assert config.support_share == 0.1 and config.tasks == ("pick",) and config.fovy_deg == (50.0, 50.0)
    assert not config.start_in_view


@pytest.mark.parametrize(
    "options, message",
    [
        ({"camera_range": "smal"}, "did you mean 'small'"),
        ({"tasks": ("pik",)}, "tasks: 'pik' is not one of pick, stack, move; did you mean 'pick'"),
        ({"objects": ("cube", "bal")}, "did you mean 'ball'"),
        ({"objects": ("cube", "cube")}, "names something twice"),
        ({"containers": ("tra",)}, "did you mean 'tray'"),
        ({"keyframes": ("grasp",)}, "lack 'lift'"),
        ({"keyframes": ("lift",)}, "lack 'place'"),
        ({"wording": "long"}, "full, varied"),
        ({"colors": ()}, "colors is empty"),
        ({"num_objects": 0}, "between 1 and 5"),
        ({"num_objects": 2, "objects": ("cube",), "colors": ("red",)}, "at most objects x colors = 1"),
        ({"num_objects": 1}, "'stack' needs num_objects >= 2"),
        ({"objects": ("cube", "can"), "tasks": ("move",)}, "may not exceed the number of objects"),
        ({"num_containers": 3}, "between 1 and 2"),
        ({"image_size": 8}, "at least 16"),
        ({"fovy_deg": 0.0}, r"fovy_deg is 0.0.*1.0 <= low <= high <= 119.0 deg"),
        ({"baseline_m": (0.07, 0.06)}, r"baseline_m is \(0.07, 0.06\)"),
        ({"noise_std": (0.0, 1.0, 2.0)}, "number or"),
        ({"support_height_m": 0.2}, "<= 0.1 m"),
        ({"support_share": 1.5}, "support_share is 1.5"),
        ({"ambient_light": 0.6, "headlight": 0.4000001}, "headlight is"),
    ],
)
def test_errors_name_the_limit(options, message):
    with pytest.raises(ValueError, match=message):
        WorldConfig(**options)


def test_unknown_names():
    with pytest.raises(ValueError, match="preset: 'geometri' is not one of default, easy, geometry; did you mean"):
        WorldConfig.from_preset("geometri")
    with pytest.raises(ValueError, match="world has no option 'fovydeg'; did you mean 'fovy_deg'"):
        WorldConfig.from_preset(fovydeg=3)


GUIDE = Path(__file__).parents[2] / "docs" / "simulation.md"


def test_guide_names_every_field_and_shows_pictures_that_exist():
    text = GUIDE.read_text()
    table = set(re.findall(r"`(\w+)`", "".join(line for line in text.splitlines() if line.startswith("| `"))))
    assert table == {field.name for field in dataclasses.fields(WorldConfig)}
    pictures = re.findall(r"\]\((images/[^)]+)\)", text)
    assert len(pictures) >= 5 and all((GUIDE.parent / picture).is_file() for picture in pictures)


def test_guides_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    exec(compile(code.replace("image_size=224", "image_size=32"), str(GUIDE), "exec"), {})
    assert capsys.readouterr().out.strip().endswith("True")
