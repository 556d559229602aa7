"""The folder of a Space of the Hub that shows a model on a page: `stereovla app`, its code, and what it needs."""

import json
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import SpaceCard

from stereovla.dataset_builder.streaming.episodes import open_splits
from stereovla.sources import ROOT

# of this package: what the page imports, and what recognises the code of a model
CODE = (
    "*.py",
    "app/*.py",
    "dataset_builder/*.py",
    "dataset_builder/dataset/*.py",
    "dataset_builder/streaming/*.py",
    "evaluation/*.py",
    "modeling_stereovla/*.py",
    "processing/*.py",
    "serving/*.py",
    "simulation/*.py",
    "simulation/assets/*",
)
SCRIPTS = ("setup.py", "train.py", "push_to_hub.py")  # of the root, which the page does not need
# beside gradio, which the header of the Space names, and what gradio brings
PACKAGES = (
    "datasets",
    "fsspec",
    "gymnasium",
    "huggingface_hub",
    "matplotlib",
    "msgpack",
    "mujoco",
    "numpy",
    "pandas",
    "peft",
    "pillow",
    "plotly",
    "prometheus-client",
    "pyarrow",
    "pyyaml",
    "safetensors",
    "simplejpeg",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "websockets",
)
# Debian's, for MuJoCo's pictures without a GPU
LIBRARIES = ("libegl1", "libgl1", "libegl-mesa0", "libgl1-mesa-dri")
HEADER = {"emoji": "👀", "colorFrom": "green", "colorTo": "blue", "pinned": False}
BODY = """
# {title}

The page of [{model}](https://huggingface.co/{model}): drop a rectified stereo pair, take a frame of a dataset or begin
a world of the simulator, say what the robot shall do, and see what the model sees, where it points, the keyframe and
the chunk of actions, in the picture and in space.

Written by `stereovla push --space`; `app.py` has the options of `stereovla app`. Where the model is private, give the
Space a secret `HF_TOKEN` that may read it.
"""
PROGRAM = '''"""The page of {model}; see `stereovla app --help` for what can be changed here."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")  # pictures without a screen

from stereovla.app.command import AppOptions, launch  # noqa: E402, reads the variable

launch(
    AppOptions(
        model={model_text},
        dataset={datasets},
        host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
        run_code={run_code},
    )
)
'''


def write_space(
    folder: Path, model: str, datasets: Sequence[str], licence: str, published: str | None, run_code: bool = False
) -> None:
    """Writes the files of the Space that shows a model or an adapter; ValueError for a dataset that is none of ours.

    Args:
        model, datasets: ids on the Hub.
        published: the card that the Space has on the Hub: its title, colours and text stay.
        run_code: as of `AppOptions`.
    """
    for name in datasets:
        open_splits(name)
    for pattern in CODE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT)
            if path.is_file() and not (len(name.parts) == 1 and path.name in SCRIPTS):
                target = folder / "stereovla" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    texts = {
        "README.md": space_card(model, datasets, licence, published),
        "requirements.txt": "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in PACKAGES),
        "packages.txt": "\n".join(LIBRARIES) + "\n",
        "app.py": PROGRAM.format(
            model=model, model_text=json.dumps(model), datasets=json.dumps(list(datasets)), run_code=run_code
        ),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def space_card(model: str, datasets: Sequence[str], licence: str, published: str | None) -> str:
    """README.md with the header that the Hub builds a Space by."""
    title = f"{model.partition('/')[2]}: a look inside"
    card = SpaceCard(published or f"---\nsdk: gradio\n---\n{BODY.format(title=title, model=model)}")
    found = card.data.to_dict()
    card.data.__dict__.update(
        {
            "title": title,
            **HEADER,
            **found,
            "sdk": "gradio",
            "sdk_version": version("gradio"),
            "python_version": ".".join(platform.python_version_tuple()[:2]),
            "app_file": "app.py",
            "license": licence,
            "models": [model],
            "datasets": list(datasets),
        }
    )
    return str(card)
