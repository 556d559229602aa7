"""Installs StereoVLA: the nine Hugging Face packages with numpy and pillow; the extras add rooms of the house."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "sim": ["mujoco>=3.3,<5", "gymnasium>=1.0,<2"],
    "data": [
        "pyarrow>=17",
        "simplejpeg>=1.8",
        "torchdata>=0.11",
        "datatrove>=0.9",
        "av>=14",
        "h5py>=3.11",
        "pyyaml>=6",
    ],
    "report": ["matplotlib>=3.9", "jinja2>=3.1", "tensorboard>=2.16"],
    "serve": ["websockets>=14", "msgpack>=1.1"],
    "convert": ["sentencepiece>=0.2.3", "protobuf>=7.36.1"],  # the oldest that the newest sentencepiece runs with
    "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.8", "torchdata>=0.11"],
}

setup(
    name="stereovla",
    version="0.1.0",
    description="A robot policy that sees with two eyes, for the Hugging Face Hub",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{name}*"
            for name in (
                "modeling_stereovla",
                "processing",
                "simulation",
                "dataset_builder",
                "training",
                "evaluation",
                "serving",
                "sharing",
            )
        ]
    ),
    py_modules=["train", "push_to_hub"],
    package_data={"simulation": ["assets/**/*"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.20,<6",
        "datasets>=5.0,<6",
        "huggingface_hub>=2.0,<3",
        "peft>=0.20",
        "accelerate>=1.10,<2",
        "trl>=1.10,<2",
        "safetensors>=0.6",
        "evaluate>=0.4.6",
        "numpy>=1.26",
        "pillow>=10",
    ],
    extras_require={**EXTRAS, "all": sorted({item for extra in EXTRAS.values() for item in extra})},
)
