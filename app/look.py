"""What a model says about a frame: chunk, keyframe, disparity or depth, where its pointers look, how long it took."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from stereovla.app.frames import Frame
from stereovla.evaluation.pointed_keyframes import pointing_maps, told_displacements, way_in_metres
from stereovla.processing.image_processing_stereovla import ViewGeometry
from stereovla.serving.served_model import ServedModel


@dataclass(frozen=True)
class Look:
    """The answer to one frame. Maps are those of the processed left view, which `geometry` makes of the source view.

    actions: (chunk, A) float32, robot units. chunk_ms: from the views to them. answered: (S,) the keyframe as the
    language model says it. pointed: (3,) m, where the pointers say that it is. attention: {name: (grid, grid)} of each
    pointer, sums to 1. disparity: (h, w) px of the processed view, at a half or a quarter of its size. depth: (H, W) m,
    planar. None, or nothing, where the model has none.
    """

    actions: np.ndarray
    chunk_ms: float
    geometry: ViewGeometry
    answered: np.ndarray | None
    pointed: np.ndarray | None
    attention: Mapping[str, np.ndarray]
    disparity: np.ndarray | None
    depth: np.ndarray | None


def is_pose(served: ServedModel, embodiment: str) -> bool:
    """Whether a robot's states are poses of the tool and its actions steps of it."""
    return bool(served.metadata()["embodiments"][embodiment]["action_names"])


def path_of(state: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """(1 + chunk, 3) m: where the tool is, and where each action of a chunk takes it."""
    return state[:3] + np.concatenate([np.zeros((1, 3)), np.cumsum(actions[:, :3], axis=0, dtype=np.float64)])


def look_at(served: ServedModel, frame: Frame, seed: int = 0) -> Look:
    """Asks the model; ValueError or TypeError for a frame that it cannot use.

    Args:
        seed: of the noise that the chunk starts from.
    """
    if served.model.config.reads_depth and not frame.carried.depths:
        raise ValueError(
            f"this model is shown depth maps of {', '.join(served.keys.depths)}, which pictures alone have not: take a "
            "frame of a dataset or the simulator"
        )
    known = frame.calibration
    if served.keys.calibration == "needed" and (known is None or known.baseline_m is None):
        raise ValueError(
            "this model sees points in space and needs the calibration of its cameras, with focal_length_px, "
            "principal_point_px and baseline_m"
        )
    if frame.embodiment not in served.processor.norm_stats:
        raise ValueError(
            f"the robot is {frame.embodiment!r}; this model knows {', '.join(served.processor.norm_stats)}"
        )
    frame = replace(frame, states=frame.states[-served.model.config.state_history :])
    asked = frame.observation(served.keys.outputs, seed)
    started = time.perf_counter()
    prepared = served.prepare(asked, np.random.default_rng(seed), check_stereo=False if frame.carried.drawn else None)
    with pointing_maps(served.model) as maps, told_displacements(served.model) as ways:
        (answer,) = served.predict([replace(prepared, outputs=(), question=None)])
    took = 1000 * (time.perf_counter() - started)
    if isinstance(answer, Exception):
        raise answer
    (further,) = served.further([prepared])
    posed = is_pose(served, frame.embodiment)
    pointed = None
    if ways and posed:
        way = way_in_metres(served.processor, ways[-1][0].double().numpy(), frame.embodiment)
        pointed = frame.states[-1, :3] + way
    depths = further.get("depth")
    return Look(
        actions=answer["actions"],
        chunk_ms=took,
        geometry=served.processor.image_processor.geometry(frame.views["left"].shape[:2]),
        answered=further["keyframe"] if further.get("keyframe_valid") else None,
        pointed=pointed,
        attention=dict(zip(served.model.pointers.names, maps[-1][0].numpy(), strict=True)) if maps else {},
        disparity=further.get("disparity"),
        depth=None if depths is None else depths["left"],
    )


def depth_seen(look: Look, frame: Frame) -> np.ndarray | None:
    """(H, W) planar depth in m of the processed left view as the model sees it; None where it sees none, or where no
    baseline says how far a disparity is.
    """
    if look.depth is not None:
        return look.depth
    if look.disparity is None or frame.calibration is None or frame.calibration.baseline_m is None:
        return None
    seen = look.geometry.calibration(frame.calibration)
    enlarged = enlarge(look.disparity, (look.geometry.height, look.geometry.width))
    product = seen.focal_length_px[0] * seen.baseline_m
    return np.divide(product, enlarged, out=np.zeros_like(enlarged), where=enlarged > 0)


def enlarge(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) -> float32 `size` (height, width), bilinear."""
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR))
