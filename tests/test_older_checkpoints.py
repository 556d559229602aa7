"""Checkpoints whose own code is older than this installation: what they lack is said in words, and how to save them
anew.
"""

import re
import subprocess
from pathlib import Path

import pytest
from command_lines import COMMAND
from tiny_checkpoint import save_tiny_checkpoint

from stereovla.sources import INTERFACE, InputError, load_checkpoint

ROOT = Path(__file__).parents[1]
# as the code of 0.1.0 was: what a StereoVLA's code has without these, it has in every version
GONE = {"configuration_stereovla.py": "reads_depth", "policy_processor.py": "encode_running_actions"}
LACKS = "it lacks config.reads_depth, processor.encode_running_actions; docs/hub.md, 'Checkpoints of older versions'"
# what commands ask of some kinds of policies alone, or of none: options and configs of their own
OTHERS = {
    "config": {
        *("calibration_dropout", "depth_config", "image_token_id", "num_tokens", "num_visual_tokens", "patch_size"),
        *("model_type", "silog_lambda", "views"),
        *("calibration_error_deg", "data_files", "delivery", "execution_horizon", "max_steps", "robot", "shown"),
        "world",
    },
    "model": {
        "action_expert",
        "config",
        "depth_expert",
        "device",
        "eval",
        "generate",
        "model",
        "parameters",
        "to",
        "visual_tokens",
        "vlm",
    },
    "processor": {"image_processor", "tool_px", "views"},
}


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("old") / "model")
    for file, name in GONE.items():
        code = (folder / file).read_text(encoding="utf-8")
        assert f"def {name}(" in code
        (folder / file).write_text(code.replace(f"def {name}(", f"def _{name}("), encoding="utf-8")
    return folder


def test_what_the_code_lacks_is_named_with_what_to_do(old):
    """Of the processor, as this process has a model's classes of its own."""
    with pytest.raises(InputError, match=r"lacks processor\.encode_running_actions; docs/hub\.md, 'Checkpoints of old"):
        load_checkpoint(str(old))
    assert "### Checkpoints of older versions" in (ROOT / "docs/hub.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--model", "{old}"],
        ["app", "--model", "{old}"],
        ["evaluate", "rollout", "--preset", "tiny", "--policies", "{old}", "--out", "{out}"],
        ["evaluate", "rollout", "--preset", "tiny", "--policies", "untrained:{old}", "--out", "{out}"],
        ["evaluate", "rollout", "--preset", "tiny", "--policies", "{old}", "--shown", "null", "--out", "{out}"],
        ["evaluate", "offline", "--model", "{old}", "--dataset", "{data}", "--out", "{out}"],
        ["evaluate", "inside", "--model", "{old}", "--dataset", "{data}", "--out", "{out}"],
    ],
    ids=lambda words: "-".join(word for word in words[:2] + words[5:6] if not word.startswith("-")),
)
def test_every_command_says_it(words, old, tmp_path):
    places = {"old": old, "out": tmp_path, "data": tmp_path}
    command = [*COMMAND, *(word.format(**places) for word in words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    expected = LACKS if "--shown" not in words else "it lacks config.reads_depth; docs/hub.md"
    assert done.returncode and expected in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_all_that_commands_use_is_looked_for():
    """What rooms that load models by the Auto classes read of config, model and processor, whichever policy it is."""
    used: dict[str, set[str]] = {part: set() for part in INTERFACE}
    for path in [path for room in ("evaluation", "serving", "app") for path in (ROOT / room).glob("*.py")]:
        code = path.read_text(encoding="utf-8")
        for part, name in re.findall(r"\b(config|model|processor)\.(?=([a-z]\w*))", code):
            used[part].add(name)
    for part, names in used.items():
        assert names - OTHERS[part] == set(INTERFACE[part]), part
