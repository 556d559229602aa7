"""All commands of `stereovla`, in the order in which people need them."""

import sys
from collections.abc import Sequence

from stereovla.command_line import Command, dispatch

SOURCES = {
    "lerobot": Command(
        "dataset_builder.formats.lerobot_source:LeRobotImportConfig",
        "dataset_builder.commands:import_lerobot",
        "a LeRobot dataset v3.0, a folder or an id on the Hub",
    ),
    "droid": Command(
        "dataset_builder.formats.droid_source:DroidImportConfig",
        "dataset_builder.commands:import_droid",
        "DROID's raw episodes (HDF5 and stereo recordings)",
    ),
    "libero": Command(
        "dataset_builder.recording.libero_demonstrations:DemonstrationsConfig",
        "dataset_builder.recording.build:build",
        "LIBERO's own demonstrations (HDF5), rendered again in stereo",
        done="dataset: {}",
    ),
    "rollouts": Command(
        "dataset_builder.formats.rollout_source:RolloutImportConfig",
        "dataset_builder.commands:import_rollouts",
        "what a policy's robot recorded (`serving.recording`)",
    ),
}
TARGETS = {
    "lerobot": Command(
        "dataset_builder.formats.lerobot_export:LeRobotExportConfig",
        "dataset_builder.formats.lerobot_export:export_lerobot",
        "a LeRobot dataset v3.0",
        done="LeRobot dataset: {}",
    ),
}
DATA = {
    "build": Command(
        "dataset_builder.recording.build:BuildConfig",
        "dataset_builder.recording.build:build",
        "record demonstrations in the simulator",
        done="dataset: {}",
    ),
    "libero": Command(
        "dataset_builder.recording.libero:LiberoBuildConfig",
        "dataset_builder.recording.build:build",
        "record demonstrations of LIBERO's tasks in stereo",
        done="dataset: {}",
    ),
    "merge": Command(
        "dataset_builder.commands:MergeOptions",
        "dataset_builder.commands:merge_parts",
        "join what several machines recorded",
        done="dataset: {}",
        positional=("dir", "parts"),
    ),
    "pipeline": Command(
        "dataset_builder.recording.pipeline:PipelineConfig",
        "dataset_builder.recording.pipeline:run_pipeline",
        "build and merge as tasks of datatrove: local, Slurm or Ray",
        done="dataset: {}",
    ),
    "import": ("check recorded episodes of a robot and import them", SOURCES),
    "export": ("write a dataset in another format", TARGETS),
    "estimate_depth": Command(
        "dataset_builder.formats.depth_estimation:DepthOptions",
        "dataset_builder.formats.depth_estimation:estimate_depth",
        "copy a dataset with the depth that a Depth Anything checkpoint estimates",
        done="dataset: {}",
    ),
    "view": Command(
        "dataset_builder.formats.rerun_view:ViewOptions",
        "dataset_builder.formats.rerun_view:view",
        "show an episode in the Rerun viewer",
        done="{}",
        positional=("dataset",),
    ),
    "check": Command(
        "dataset_builder.commands:CheckOptions",
        "dataset_builder.commands:check",
        "name every problem of a dataset; exit status 1 if there is any",
        positional=("dir",),
    ),
    "card": Command(
        "dataset_builder.commands:CardOptions",
        "dataset_builder.commands:card",
        "write the card of a dataset anew",
        done="card: {}",
        positional=("dir",),
    ),
}
STAGES = {
    "stereo": Command(
        "training.stereo:StereoOptions", "training.stereo:train", "the stereo encoder alone, from true disparity"
    ),
    "depth": Command("training.depth:DepthOptions", "training.depth:train", "the depth expert alone, from true depth"),
    "grounding": Command(
        "training.grounding:GroundingOptions",
        "training.grounding:train",
        "answers: boxes, depths, poses, camera parameters",
    ),
    "reward": Command(
        "training.reward:RewardOptions", "training.reward:train", "better boxes and depths, by rewards (GRPO)"
    ),
}
MEASURES = {
    "rollout": Command(
        "evaluation.options:RolloutOptions", "evaluation.commands:rollout", "closed-loop rollouts in the simulator"
    ),
    "libero": Command(
        "evaluation.options:LiberoOptions", "evaluation.commands:libero", "rollouts in LIBERO, seen by a stereo pair"
    ),
    "delays": Command(
        "evaluation.options:DelayOptions", "evaluation.commands:delays", "rollouts with a policy that answers late"
    ),
    "offline": Command(
        "evaluation.options:OfflineOptions", "evaluation.commands:offline", "errors on held-out rows of a dataset"
    ),
    "inside": Command(
        "evaluation.options:InsideOptions",
        "evaluation.commands:inside",
        "a page of what a policy looks at and what it makes of it",
        done="page: {}",
    ),
    "report": Command(
        "evaluation.options:ReportOptions",
        "evaluation.commands:report",
        "plots, film, page and numbers of both",
        done="report: {}",
    ),
}
CONVERTERS = {
    "stereovla": Command(
        "modeling_stereovla.convert_stereovla:Options",
        "modeling_stereovla.convert_stereovla:convert",
        "the released StereoVLA checkpoint",
        done="wrote {}",
    ),
    "parts": Command(
        "modeling_stereovla.convert_parts:Options",
        "modeling_stereovla.convert_parts:convert",
        "a new model from separately downloaded parts",
        done="wrote {}",
    ),
    "depthvla": Command(
        "modeling_stereovla.convert_depthvla:Options",
        "training.assembly:assemble",
        "a DepthVLA from PaliGemma or pi0, and Depth Anything",
        done="wrote {}",
    ),
    "pi0": Command(
        "modeling_stereovla.convert_pi0:Options",
        "modeling_stereovla.convert_pi0:convert",
        "a DepthVLA without depth expert as transformers' PI0",
        done="wrote {}",
    ),
    "lerobot": Command(
        "sharing.lerobot_policy:Options",
        "sharing.lerobot_policy:convert",
        "a model of ours as a policy of LeRobot, and back",
        done="wrote {}",
    ),
    "processor": Command(
        "processing.convert_processor:Options",
        "processing.convert_processor:convert",
        "the processor of either",
        done="{} has its processor",
    ),
    "foundationstereo": Command(
        "modeling_stereovla.convert_foundationstereo:Options",
        "modeling_stereovla.convert_foundationstereo:convert",
        "FoundationStereo alone, as a StereoEncoderModel",
        done="wrote {}",
    ),
    "internlm2": Command(
        "modeling_stereovla.convert_internlm2:Options",
        "modeling_stereovla.convert_internlm2:convert",
        "InternLM2 as a Llama",
        done="wrote {}",
    ),
    "vision_towers": Command(
        "modeling_stereovla.convert_vision_towers:Options",
        "modeling_stereovla.convert_vision_towers:convert",
        "SigLIP and DINOv2 under timm's names",
        done="wrote {}",
    ),
}
COMMANDS = {
    "data": ("record, import, check and describe datasets", DATA),
    "train": Command("train:TrainingOptions", "train:train", "train a policy, or an adapter for a robot"),
    "pretrain": ("train one part or one stage", STAGES),
    "evaluate": ("measure a policy", MEASURES),
    "serve": Command("serving.serve:ServingOptions", "serving.serve:serve", "answer robots over a WebSocket"),
    "app": Command("app.command:AppOptions", "app.command:launch", "a page to look at a policy"),
    "push": Command(
        "push_to_hub:PushOptions", "push_to_hub:push", "publish a model, an adapter or a dataset on the Hub"
    ),
    "convert": ("published weights to ours, and ours to others'", CONVERTERS),
}
ABOUT = "A robot policy that sees with two eyes. Interrupted commands go on when they are given again."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    return dispatch(COMMANDS, ABOUT, "stereovla", sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
