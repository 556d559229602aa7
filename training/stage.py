"""What the stages that TRL's trainers run have in common: their options, checkpoints, log and result."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from stereovla.command_line import option
from stereovla.modeling_stereovla.objectives import objectives_of
from stereovla.sources import adapted_model
from stereovla.training.checkpoint_folders import complete_checkpoint, remove_old, step_of
from stereovla.training.checkpoints import load_optimizer, optimizer_tensors, whole_tensors, write_stream, write_tensors
from stereovla.training.feed import Feed
from stereovla.training.models import Policy, Processor, classes_of, config_of, load_policy, trained, untrained
from stereovla.training.options import RunOptions
from stereovla.training.result import complete, predict_one
from stereovla.training.running import append_line, end, forget_after, seed_step, told_to_end

LOG = "losses.jsonl"
SAVING = "checkpoint.partial"  # where the trainers write, and remove nothing else: what is whole moves out
# what a checkpoint holds beside the trainer's own files
OPTIMIZER, SCHEDULER = "optimizer.safetensors", "scheduler.json"
# the trainers' names of what the log keeps, and ours
LOGGED = {
    "loss": "loss/total",
    "mean_token_accuracy": "accuracy/total",
    "reward": "reward",
    "reward_std": "reward_std",
    "completions/mean_length": "answer_tokens",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
}
# parts that no answer in words depends on
OF_ACTIONS = ("action_expert", "pointers")
SIZES = ("tiny", "demo", "full")


@dataclass(kw_only=True)
class StageOptions(RunOptions):
    """What every such stage can be told. Options marked (preset) default to the preset's value."""

    preset: str = option(
        "demo", "Size of the run, and of an untrained model.", choices=[*SIZES, *(f"depthvla-{name}" for name in SIZES)]
    )
    model: str | None = option(None, "Folder or Hub id of the model to start from.")
    steps: int = option(300, "Optimizer steps (preset).")
    warmup_steps: int = option(30, "Steps of linear warm-up, before the cosine to zero (preset).")
    mixed_precision: str = option("no", "Arithmetic of the activations (preset).", choices=["no", "bf16"])
    gradient_checkpointing: bool = option(False, "Compute activations again instead of keeping them (preset).")
    depth_points: str | None = option(
        None,
        "Where depth is asked: near gripper and target (not given: where the data has masks of these), or all over.",
        choices=["interaction", "uniform"],
    )


def this_process() -> PartialState:
    """Its part in what `accelerate launch` or torchrun started."""
    return PartialState(cpu=not torch.accelerator.is_available())


def part_size(options: StageOptions) -> int:
    """Of the samples of a step, those that a process computes at once."""
    return options.batch_size // (PartialState().num_processes * options.accumulation)


def starting_config(options: StageOptions) -> Any:
    """The config of the policy that the training begins with, before any weights are loaded."""
    if options.model is None:
        return config_of(options.preset)
    source = adapted_model(options.model) or options.model
    return classes_of(source)[0].config_class.from_pretrained(source)


def freeze_unused(model: Policy, parts: Sequence[str]) -> None:
    """Holds `parts` and what answers do not depend on fixed: the heads, a depth expert that the language model does not
    see, and a stereo encoder that is to learn from disparity alone, of which there is none here.
    """
    also = [name for name in OF_ACTIONS if getattr(model, name) is not None]
    if getattr(model.model, "depth_expert", None) is not None and model.config.mask == "block":
        also.append("depth_expert")
    if getattr(model.config, "stereo_learns_from", "all") == "disparity":
        also.append("stereo")
    model.freeze(*dict.fromkeys([*parts, *also]))


def trainer_arguments(options: StageOptions) -> dict[str, Any]:
    """Keywords of TRL's configs."""
    return {
        "output_dir": str(Path(options.output_dir) / SAVING),
        "max_steps": options.steps,
        "per_device_train_batch_size": part_size(options),
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": options.warmup_steps,
        "weight_decay": options.weight_decay,
        "adam_beta2": 0.95,
        "max_grad_norm": options.max_grad_norm,
        "bf16": options.mixed_precision == "bf16",  # TRL's default is bfloat16, on any machine
        "gradient_checkpointing": options.gradient_checkpointing,
        "seed": options.seed,
        "use_cpu": PartialState().device.type == "cpu",
        "logging_steps": options.log_every,
        "logging_nan_inf_filter": False,
        "disable_tqdm": False,
        "report_to": "none",
        "save_steps": options.checkpoint_every,
        "save_only_model": True,  # the optimizer's state would be pickled; `RunFiles` saves it
        "remove_unused_columns": False,
    }


def starting_model(options: StageOptions, checkpoint: Path | None, meta: dict) -> tuple[Policy, Processor]:
    """The model as the training begins or goes on, and its processor; it has a language loss from now on."""
    torch.manual_seed(options.seed)
    model, processor = untrained(options.preset, meta) if options.model is None else trained(options.model, meta)
    if not model.config.language_loss_weight:
        model.config.language_loss_weight = 1.0
        model.objectives = objectives_of(model.config)
    if checkpoint is not None:  # into the model that it began as: what else the result says of it stays the same too
        model.load_state_dict(load_policy(str(checkpoint)).state_dict())
    return model, processor


class LoadedBefore:
    """For a trainer whose model was loaded from the checkpoint that it goes on from."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Nothing: Trainer itself would leave out every weight that transformers saves under another name than the
        model's (DINOv2's attention), with no more than a warning.
        """


class RunFiles(TrainerCallback):
    """Writes losses.jsonl, completes the trainer's checkpoints, and restores what it completed them with.

    All randomness of a step follows from (seed, step, process), so no generator's state is saved.
    """

    def __init__(
        self,
        options: StageOptions,
        checkpoint: Path | None,
        feed: Feed | None = None,
        validate: Callable[[], dict[str, float]] | None = None,
    ):
        """
        Args:
            checkpoint: where the training goes on from.
            feed: batches whose place in the stream is saved; None = the trainer counts the batches itself.
            validate: held-out losses, computed at the start and with each checkpoint.
        """
        self.options, self.checkpoint, self.feed, self.validate = options, checkpoint, feed, validate
        self.output = Path(options.output_dir)
        self.log = self.output / LOG
        self.told: list[int] = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        if state.is_world_process_zero:
            forget_after(self.log, -1 if self.checkpoint is None else state.global_step)
        if self.checkpoint is None:
            self._write_validation(state)
            return
        load_optimizer(self.checkpoint / OPTIMIZER, model, optimizer)
        lr_scheduler.load_state_dict(json.loads((self.checkpoint / SCHEDULER).read_text()))
        for group, rate in zip(optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def on_step_begin(self, args, state, control, **kwargs):
        seed_step(self.options.seed, state.global_step, args.process_index)

    def on_step_end(self, args, state, control, **kwargs):
        if any(gather_object([bool(self.told)])):  # all processes alike
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            raise FloatingPointError(
                f"the gradient norm is {logs['grad_norm']} at step {state.global_step}; start again with a checkpoint "
                f"in {self.options.output_dir} as --model, another --output_dir and a lower --learning_rate"
            )
        if state.is_world_process_zero and "train_runtime" not in logs:  # the last ones sum the run up
            append_line(self.log, {"step": state.global_step} | renamed(logs))

    def on_save(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        tensors = optimizer_tensors(model, optimizer)
        self._write_validation(state)
        if self.feed is not None:
            write_stream(folder, args.process_index, self.feed)
        if state.is_world_process_zero:
            (folder / "training_args.bin").unlink()  # a pickle of what options.json says
            write_tensors(folder / OPTIMIZER, tensors)
            (folder / SCHEDULER).write_text(json.dumps(lr_scheduler.state_dict()))
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            complete_checkpoint(folder, self.output / folder.name)
            remove_old(self.output, self.options.keep_checkpoints)

    def _write_validation(self, state) -> None:
        if self.validate is not None:
            line = {"step": state.global_step} | self.validate()
            if state.is_world_process_zero:
                append_line(self.log, line)


def renamed(logs: dict[str, float | None]) -> dict[str, float]:
    """What the log keeps of the trainer's numbers, under the names that train.py gives them. Left out are those of a
    kind of question that was not asked in these steps, which TRL gives as None.
    """
    found = {}
    for name, value in logs.items():
        place = "validation/" if name.startswith("eval_") else ""
        name = name.removeprefix("eval_")
        if value is not None and (name in LOGGED or name.startswith("rewards/")):
            found[place + LOGGED.get(name, name)] = value
    return found


def finish(
    trainer: Trainer, files: RunFiles, processor: Processor, window: dict[str, Any], summary: dict[str, Any]
) -> Path:
    """Trains, or goes on training, and returns the folder of the model; `window` and `summary` as in
    `training.result.complete`.
    """
    options = files.options
    done = 0 if files.checkpoint is None else step_of(files.checkpoint)
    if done < options.steps:  # from the last checkpoint Trainer would take one step more
        with told_to_end() as files.told:
            trainer.train(resume_from_checkpoint=str(files.checkpoint) if done else None)
        done = trainer.state.global_step
    if done < options.steps:
        trainer.accelerator.print(f"told to end at step {done}: the same command goes on from it")
        end(files.told)
    state = whole_tensors(trainer.model_wrapped)
    prediction = predict_one(trainer.accelerator.unwrap_model(trainer.model_wrapped), processor, window)
    if trainer.accelerator.is_main_process:
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
        partial = options.result.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        trainer.accelerator.unwrap_model(trainer.model_wrapped).save_pretrained(partial, state_dict=state)
        complete(partial, options.result, processor, prediction, summary | {"options": asdict(options)})
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.print(f"trained model: {options.result}")
    return options.result
