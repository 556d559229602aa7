"""A model and its processor, as a server needs them: observations in, actions out, many at once."""

import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from stereovla.serving.calibration_watch import watch_of
from stereovla.serving.observation_keys import PAIR, Observation, ObservationKeys
from stereovla.serving.wire import DEFAULT_LIMIT
from stereovla.untrusted import open_image

PICTURES = ("JPEG", "PNG")
# of a state or a keyframe that is a pose of the tool, by how many numbers it has; of an action they are displacements
POSES = {7: ("x", "y", "z", "roll", "pitch", "yaw", "gripper"), 5: ("x", "y", "z", "yaw", "gripper")}
UNITS = {"x": "m", "y": "m", "z": "m", "roll": "rad", "pitch": "rad", "yaw": "rad", "gripper": "1 = open"}


class InternalError(RuntimeError):
    """The server's own fault."""


@dataclass
class Prepared:
    """The model's inputs for one observation, batch 1, on the CPU.

    noise: float32 (1, chunk, action_dim). question: inputs that ask for the keyframe, where that is asked for.
    running: what `predict_action` is told of the chunk that is executed, `running_actions` and `delay`; {} = nothing.
    tool_px: (2,) of `tool_px` of the processor, for a model whose calibration is watched; None = it is not.
    """

    inputs: dict[str, torch.Tensor]
    noise: torch.Tensor
    embodiment: str
    outputs: tuple[str, ...]
    question: dict[str, torch.Tensor] | None = None
    running: dict[str, torch.Tensor] = field(default_factory=dict)
    tool_px: np.ndarray | None = None

    @property
    def kind(self) -> tuple:
        """What observations of one batch have in common: nothing of them is padded, nothing is asked for one alone."""
        asked = {**self.inputs, **{f"question.{name}": value for name, value in (self.question or {}).items()}}
        shapes = tuple((name, tuple(value.shape)) for name, value in sorted(asked.items()))
        views = self.inputs.get("view_mask")
        delay = self.running["delay"].item() if self.running else None  # it decides how the chunk is continued
        return shapes, self.outputs, None if views is None else tuple(views.flatten().tolist()), delay


class ServedModel:
    """A model and its processor, loaded through the Auto classes.

    Args:
        name, revision: what the metadata call the model, and what identifies its weights.
        keys, embodiment: as of `ObservationKeys`.
        limit: bytes that the pictures of an observation which come compressed may have as they are decoded.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        revision: str = "",
        keys: Mapping[str, Any] | None = None,
        embodiment: str = "",
        limit: int = DEFAULT_LIMIT,
    ):
        self.model, self.processor, self.name, self.revision, self.limit = (
            model.eval().requires_grad_(False),
            processor,
            name,
            revision,
            limit,
        )
        self.watch = watch_of(model, processor)
        self.named = hasattr(processor, "views")  # whether the processor takes views by name; else it takes a pair
        # transformers' own PI0 begins every chunk anew and writes nothing
        self.is_pi0 = model.config.model_type == "pi0_policy"
        if not processor.norm_stats:
            raise ValueError(f"{name} has no statistics of any robot (norm_stats): its actions have no units")
        self.keys = ObservationKeys(
            views=tuple(processor.pixel_views) if self.named else PAIR,
            depths=(tuple(processor.views) if self.named else PAIR[:1]) if model.config.reads_depth else (),
            outputs=self._outputs(),
            embodiments=tuple(processor.norm_stats),
            keys=keys,
            embodiment=embodiment,
            calibration=self._calibration(),
        )

    def _calibration(self) -> str:
        """Whether the model is told none, may be told one, or must, as it never saw a view without."""
        if getattr(self.processor, "points_frame", None) is None:
            return "needed" if self.model.config.reads_depth and not self.named else ""
        return "known" if self.model.config.calibration_dropout else "needed"

    def _outputs(self) -> tuple[str, ...]:
        known = all("keyframe_pose" in statistics for statistics in self.processor.norm_stats.values())
        keyframe = known and not self.is_pi0
        depth = getattr(self.model.config, "depth_config", None) is not None
        disparity = not self.named and self.model.config.stereo_config is not None
        asked = {"keyframe": keyframe, "disparity": disparity, "depth": depth}
        return tuple(name for name, there in asked.items() if there)

    def metadata(self) -> dict[str, Any]:
        """What a client is told on connect; see docs/serving.md."""
        config, keys = self.model.config, self.keys
        return {
            "model": self.name,
            "revision": self.revision,
            "chunk_size": config.chunk_size,
            "max_delay": None if self.is_pi0 else config.max_delay,
            "state_history": config.state_history,
            "image_size": [config.image_size, config.image_size],
            "views": list(keys.views),
            "depths": list(keys.depths),
            "calibration": keys.calibration,
            "outputs": list(keys.outputs),
            "embodiments": {name: self._robot(name) for name in self.processor.norm_stats},
            "embodiment": keys.embodiment,
            "keys": keys.keys,
        }

    def _robot(self, embodiment: str) -> dict[str, Any]:
        """Rate, names and units of one robot; [] for names that nobody has given."""
        rates = self.processor.control_rates_hz or {}
        names = (getattr(self.processor, "state_names", None) or {}).get(embodiment)
        size, action = self.model.config.state_dim, self.model.config.action_dim
        state = list(POSES.get(size, ()) if names is None else names)
        posed = tuple(state) == POSES.get(action)
        return {
            "rate_hz": rates.get(embodiment),
            "state_names": state,
            "state_units": [UNITS.get(name, "") for name in state],
            "action_names": [name if name == "gripper" else f"d{name}" for name in state if posed],
            "action_units": [UNITS[name] if name != "gripper" else "-1 closes, 1 opens" for name in state if posed],
        }

    # ------------------------------------------------------------------ observations

    def prepare(
        self, observation: Observation, generator: np.random.Generator, check_stereo: bool | None = None
    ) -> Prepared:
        """The model's inputs; ValueError or TypeError for what cannot be used.

        Args:
            generator: of the noise of an observation that has no seed.
            check_stereo: look for swapped or unrectified views; None = where the processor does.
        """
        own = observation.seed is not None
        shape = (1, self.model.config.chunk_size, self.model.config.action_dim)
        noise = (np.random.default_rng(observation.seed) if own else generator).standard_normal(shape, dtype=np.float32)
        images = self._pictures(observation.images)
        given: dict[str, Any] = {
            "images": images if self.named else [images[name] for name in PAIR],
            "text": observation.instruction,
            "state": observation.state,
            "embodiment": observation.embodiment,
        }
        if self.model.config.reads_depth:
            given["depth_map"] = observation.depths if self.named else observation.depths["left"]
        if self.keys.calibration:
            given["calibration"] = observation.calibration
        try:
            inputs = dict(self.processor(**given, check_stereo=check_stereo))
            asks = "keyframe" in observation.outputs
            question = dict(self.processor(**given, objective="pose", check_stereo=False)) if asks else None
            running = self._running(observation)
            tool = self._tool_px(observation, images)
        except (ValueError, TypeError):
            raise
        except Exception as error:
            raise InternalError(f"{type(error).__name__}: {error}") from error
        noise = torch.from_numpy(noise)
        return Prepared(inputs, noise, observation.embodiment, observation.outputs, question, running, tool)

    def _tool_px(self, observation: Observation, images: Mapping[str, Any]) -> np.ndarray | None:
        """Where the calibration says that the tool is, for `watch`."""
        if self.watch is None:
            return None
        left = images["left"]
        size = (left.height, left.width) if isinstance(left, Image.Image) else left.shape[:2]
        return self.processor.tool_px(observation.state, observation.calibration, observation.embodiment, size)

    def _running(self, observation: Observation) -> dict[str, torch.Tensor]:
        if observation.running_actions is None:
            return {}
        if self.is_pi0:
            raise ValueError(f"{self.name} is transformers' PI0 and begins every chunk anew; send no running_actions")
        actions = self.processor.encode_running_actions([observation.running_actions], observation.embodiment)
        length = len(observation.running_actions)
        if observation.delay > length:
            raise ValueError(f"delay is {observation.delay}; it must be at most {length}, the steps of running_actions")
        return {"running_actions": actions, "delay": torch.tensor([observation.delay])}

    def _pictures(self, images: Mapping[str, Any]) -> dict[str, Any]:
        """Views as the processor takes them; those of files decoded, once their sizes are known to be bounded."""
        opened = {name: open_picture(data, name) for name, data in images.items() if isinstance(data, bytes)}
        total = sum(3 * picture.width * picture.height for picture in opened.values())
        if total > self.limit:
            sizes = ", ".join(f"{name} {picture.width}x{picture.height} px" for name, picture in opened.items())
            raise ValueError(f"the pictures ({sizes}) have {total:,} bytes decoded; at most {self.limit:,} are")
        for name, picture in opened.items():
            try:
                picture.load()
            except Exception as error:  # Pillow raises many kinds, struct.error and zlib.error among them
                raise ValueError(f"the {name} view cannot be decoded: {type(error).__name__}: {error}") from error
        return {**images, **opened}

    # ------------------------------------------------------------------ answers

    def predict(self, batch: Sequence[Prepared]) -> list[dict[str, Any] | Exception]:
        """For each observation of one kind {"actions": float32 (chunk, action_dim) in robot units, ...} with what else
        it asked for, or an `InternalError`. Where they cannot be answered together, each is alone.
        """
        try:
            return self._predict(batch)
        except Exception as error:  # the server goes on, whatever a model does
            if len(batch) > 1:
                return [self.predict([one])[0] for one in batch]
            traceback.print_exception(error)
            return [InternalError(f"{type(error).__name__}: {error}")]

    def _predict(self, batch: Sequence[Prepared]) -> list[dict[str, Any] | Exception]:
        device, names = self.model.device, [one.embodiment for one in batch]
        inputs = _batched([one.inputs for one in batch], device)
        noise = torch.cat([one.noise for one in batch]).to(device)
        running = _batched([one.running for one in batch], device)
        chunks = self.model.predict_action(**inputs, noise=noise, **running)
        self._look_for_a_wrong_calibration(batch)
        finite = chunks.isfinite().all(dim=-1).all(dim=-1).tolist()
        good = [row for row, fine in enumerate(finite) if fine]
        decoded = self.processor.decode_actions(chunks[good], [names[row] for row in good]) if good else []
        found = dict(zip(good, decoded, strict=True))
        further = self.further(batch) if batch[0].outputs else [{}] * len(batch)
        lost = InternalError("the model's actions are not finite for these inputs")
        return [{"actions": found[row], **further[row]} if row in found else lost for row in range(len(batch))]

    def _look_for_a_wrong_calibration(self, batch: Sequence[Prepared]) -> None:
        """Says once that the calibrations that clients send are not those of their cameras."""
        if any(one.tool_px is None for one in batch):
            return
        self.watch.compare([one.tool_px for one in batch])
        if problem := self.watch.news():
            print(f"warning: {problem}", file=sys.stderr, flush=True)

    @torch.inference_mode()
    def further(self, batch: Sequence[Prepared]) -> list[dict[str, Any]]:
        """What observations of one kind ask for beside actions."""
        device, asked, rows = self.model.device, batch[0].outputs, [dict[str, Any]() for _ in batch]
        inputs = _batched([one.inputs for one in batch], device)
        if "disparity" in asked:  # of a half or a quarter of the resolution
            disparity = self.model(**inputs, output_disparity=True).disparity.float().cpu().numpy()
            for row, found in zip(rows, disparity, strict=True):
                row["disparity"] = found
        if "depth" in asked:
            depth = self.model(**inputs, output_depth=True).depth.float().cpu().numpy()
            for row, found in zip(rows, depth, strict=True):
                row["depth"] = dict(zip(self.processor.views, found, strict=True))
        if "keyframe" in asked:
            poses, valid = self._keyframes(batch, device)
            for row, pose, fine in zip(rows, poses, valid, strict=True):
                row["keyframe"], row["keyframe_valid"] = pose, bool(fine)
        return rows

    def _keyframes(self, batch: Sequence[Prepared], device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """As `decode_poses` of the processor; greedily generated."""
        question = _batched([one.question for one in batch], device)
        del question["state"]  # written in the prompt where the question needs it
        ids = self.model.generate(
            **question,
            max_new_tokens=self.processor.pose_dim + 1,
            do_sample=False,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            # a VLM that sees the depth expert's tokens cannot go on from a cache of its own
            use_cache=getattr(self.model.config, "mask", "") != "full",
        )
        ids = ids[:, question["input_ids"].shape[1] :].cpu()
        missing = self.processor.pose_dim - ids.shape[1]  # of an answer that ended too early
        ids = torch.nn.functional.pad(ids, (0, max(0, missing)), value=self.processor.tokenizer.pad_token_id)
        return self.processor.decode_poses(ids, [one.embodiment for one in batch])

    def warm_up(self, sizes: Sequence[int]) -> None:
        """Answers made-up observations in batches of `sizes`, so that a client's first waits no longer than others."""
        size, embodiment = self.model.config.image_size, next(iter(self.processor.norm_stats))
        middle = np.zeros((1, self.model.config.state_dim), np.float32)
        view = np.zeros((size, size, 3), np.uint8)
        given = {
            "images": dict.fromkeys(self.keys.views, view) if self.named else [view, view],
            "text": "warm up",
            "state": self.processor.normalizer.unnormalize(middle, embodiment, "state").astype(np.float32),
            "embodiment": embodiment,
        }
        if self.model.config.reads_depth:
            depth = np.ones((size, size), np.float32)
            given["depth_map"] = dict.fromkeys(self.keys.depths, depth) if self.named else depth
        if self.keys.calibration:
            middle_px = [size / 2, size / 2]
            given["calibration"] = {"focal_length_px": middle_px, "principal_point_px": middle_px, "baseline_m": 0.1}
        inputs = dict(self.processor(**given, check_stereo=False))
        noise = torch.zeros(1, self.model.config.chunk_size, self.model.config.action_dim)
        kinds: list[dict[str, torch.Tensor]] = [{}]
        if not self.is_pi0:  # and those that continue a chunk, which is given or guides them
            longer = self.model.config.max_delay + 1
            delays = {1, longer} if longer <= self.model.config.chunk_size else {1}
            kinds += [{"running_actions": noise, "delay": torch.tensor([delay])} for delay in sorted(delays)]
        for running in kinds:
            for count in sizes:
                (*_, answer) = self._predict([Prepared(inputs, noise, embodiment, (), running=running)] * count)
                if isinstance(answer, Exception):
                    raise answer


def open_picture(data: bytes, name: str) -> Image.Image:
    """A JPEG or PNG, not decoded yet; ValueError for anything else."""
    try:
        return open_image(data, PICTURES)
    except Exception as error:
        raise ValueError(f"the {name} view is no picture of {' or '.join(PICTURES)}: {error}") from error


def _batched(inputs: Sequence[Mapping[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.cat([one[name] for one in inputs]).to(device) for name in inputs[0]}
