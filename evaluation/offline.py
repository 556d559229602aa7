"""Errors of a model on held-out rows: actions, depth answers, boxes, keyframe poses and disparity."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from stereovla.evaluation import metrics
from stereovla.evaluation.held_out import HeldOutRow
from stereovla.evaluation.model_policy import ModelPolicy
from stereovla.evaluation.offline_geometry import Collected, GeometryEvaluation, predicted_errors, with_another_scene
from stereovla.evaluation.shown_geometry import controls

DEPTH_TOKENS = 16  # room for an answer such as "[0.53]" and the end, even where every character is a token
BOX_TOKENS = 8  # 4 for each view
HISTOGRAM_BINS = 24


class OfflineEvaluation:
    """Asks a policy everything about rows, batch by batch, through the processor and `generate` or `predict_action`."""

    def __init__(self, policy: ModelPolicy):
        self.policy, self.model, self.processor = policy, policy.model, policy.processor
        self.collected = Collected()

    def evaluate(self, rows: Iterable[HeldOutRow], batch_size: int = 16) -> dict[str, Any]:
        """Report over all rows: {"rows", "action", "depth", "box", "keyframe", "pointed_keyframe", "disparity",
        "geometry"}; see `report`.
        """
        pairs = with_another_scene(rows)
        count, config = 0, self.model.config
        geometry = GeometryEvaluation(self.policy) if controls(config) else None
        while found := list(islice(pairs, batch_size)):
            batch = [row for row, _ in found]
            count += len(batch)
            given = predicted_errors(self.policy, batch)
            self.collected.add(**given)
            if config.language_loss_weight:  # else it has learned no answer in words
                self.depths(batch)
                self.boxes(batch)
                self.keyframes(batch)
            if geometry is not None:
                geometry.add(batch, [other for _, other in found], given)
            if self.policy.is_stereovla and config.stereo_config is not None:
                self.disparities(batch)
        if not count:
            raise ValueError("no held-out rows: nothing can be evaluated")
        return {"rows": count, **self.report(), "geometry": None if geometry is None else geometry.report()}

    # ------------------------------------------------------------------ questions

    def depths(self, rows: Sequence[HeldOutRow]) -> None:
        for name in ("target", "gripper"):
            asked = [row for row in rows if name in row.points_px]
            if not asked:
                continue
            points = [row.points_px[name] for row in asked]
            ids = self.answer(asked, "depth", DEPTH_TOKENS, points_px=points)
            truth = np.array([row.depth_at(point) for row, point in zip(asked, points, strict=True)])
            errors = metrics.depth_errors(self.processor.decode_depths(ids), truth)
            parsed = np.isfinite(errors)
            self.collected.add(**{f"{name}_depth_cm": errors[parsed], f"{name}_depth_truth_cm": 100 * truth})
            self.collected.add(depth_unparsable=~parsed)

    def boxes(self, rows: Sequence[HeldOutRow]) -> None:
        sides = 2 if "right" in self.processor.pixel_views else 1
        asked = [row for row in rows if row.boxes_px is not None and np.isfinite(row.boxes_px[:sides]).all()]
        if not asked:
            return
        ids = self.answer(asked, "box", BOX_TOKENS, text=[row.target for row in asked])
        ids = torch.nn.functional.pad(ids, (0, BOX_TOKENS - ids.shape[1]), value=self.processor.tokenizer.pad_token_id)
        predicted, valid = self.processor.decode_boxes(ids, source_size=asked[0].left.shape[:2])
        truth = np.stack([row.boxes_px for row in asked])[:, : predicted.shape[1]]
        iou = metrics.box_iou(predicted, truth) * valid[:, None]
        self.collected.add(**dict(zip(("left_iou", "right_iou"), iou.T, strict=False)), box_invalid=~valid)

    def keyframes(self, rows: Sequence[HeldOutRow]) -> None:
        rows = [row for row in rows if row.keyframe_pose is not None]
        if not rows:
            return
        size = self.model.config.pose_dim
        ids = self.answer(
            rows, "pose", size, text=[row.task for row in rows], state=[self.history(row) for row in rows]
        )
        ids = torch.nn.functional.pad(ids, (0, size - ids.shape[1]), value=self.processor.tokenizer.pad_token_id)
        poses, valid = self.processor.decode_poses(ids, [row.embodiment for row in rows])
        truth = np.stack([row.keyframe_pose for row in rows])
        # folders that were saved before have no such option
        symmetry = max(1, getattr(self.processor, "turn_symmetry", 0))
        errors = metrics.keyframe_errors(poses[valid], truth[valid], symmetry)
        self.collected.add(**{f"keyframe_{name}": values for name, values in errors.items()}, keyframe_invalid=~valid)

    def disparities(self, rows: Sequence[HeldOutRow]) -> None:
        rows = [row for row in rows if row.depth_m is not None and row.calibration is not None]
        if not rows:
            return
        inputs = self.processor(
            images=self.policy.images([row.views for row in rows]),
            text=[row.task for row in rows],
            state=[self.history(row) for row in rows],
            embodiment=[row.embodiment for row in rows],
            depth_map=[row.depth_m for row in rows],
            calibration=[row.calibration for row in rows],
            check_stereo=False,
        )
        truth = (inputs["disparity"] if self.policy.needs_depth else inputs.pop("disparity")).numpy()
        with torch.inference_mode():
            predicted = self.model(**inputs.to(self.model.device), output_disparity=True).disparity
        self.collected.add(disparity_px=metrics.disparity_errors(predicted.float().cpu().numpy(), truth))

    def history(self, row: HeldOutRow) -> np.ndarray:
        return row.states[-self.model.config.state_history :]

    def answer(self, rows: Sequence[HeldOutRow], objective: str, tokens: int, **arguments: Any) -> torch.Tensor:
        """Greedily generated ids (B, at most `tokens`) of a question, on the CPU."""
        arguments |= self.policy.shown_beside(rows)
        inputs = self.processor(
            images=self.policy.images([row.views for row in rows]),
            embodiment=[row.embodiment for row in rows],
            objective=objective,
            check_stereo=False,
            **arguments,
        ).to(self.model.device)
        del inputs["state"]  # written in the prompt where the question needs it
        ids = self.model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            # a VLM that sees the depth expert's tokens cannot go on from a cache of its own
            use_cache=getattr(self.model.config, "mask", "block") != "full",
        )
        return ids[:, inputs["input_ids"].shape[1] :].cpu()

    # ------------------------------------------------------------------ report

    def report(self) -> dict[str, Any]:
        """Means, medians and 90 % quantiles of every error, shares of invalid answers, histograms for the plots.

        To compare with: `still_mm`, an arm that does not move; `constant_cm`, the best depth answer without looking.
        """
        data = self.collected
        report: dict[str, Any] = {
            "action": {name: metrics.summary(data.array(name)) for name in ("position_mm", "rotation_deg")}
            | {"chunk_position_mm": metrics.summary(data.array("chunk_position_mm"))}
            | {"still_mm": metrics.summary(data.array("still_mm")), "gripper_accuracy": _mean(data, "gripper_right")},
            "depth": {"unparsable": _mean(data, "depth_unparsable")},
            "box": {name: metrics.summary(data.array(name)) for name in ("left_iou", "right_iou")}
            | {"invalid": _mean(data, "box_invalid")},
            "keyframe": {
                name: metrics.summary(data.array(f"keyframe_{name}")) for name in ("xy_cm", "z_cm", "rotation_deg")
            }
            | {"gripper_accuracy": _mean(data, "keyframe_gripper_right"), "invalid": _mean(data, "keyframe_invalid")},
            "pointed_keyframe": {name: metrics.summary(data.array(f"pointed_{name}")) for name in ("xy_cm", "z_cm")},
            "disparity": {"error_px": metrics.summary(data.array("disparity_px"))},
        }
        for name in ("target", "gripper"):
            truth = data.array(f"{name}_depth_truth_cm")
            constant = np.abs(truth - np.median(truth)) if len(truth) else truth
            report["depth"] |= {
                f"{name}_cm": metrics.summary(data.array(f"{name}_depth_cm")),
                f"{name}_constant_cm": metrics.summary(constant),
            }
        names = ("position_mm", "target_depth_cm", "left_iou", "keyframe_xy_cm", "disparity_px")
        report["histograms"] = {
            name: histogram(data.array(name), 1.0 if name == "left_iou" else None) for name in names
        }
        return report


def _mean(data: Collected, name: str) -> float | None:
    values = data.array(name)
    return float(values.mean()) if len(values) else None


def histogram(values: np.ndarray, high: float | None = None) -> dict[str, list[float]] | None:
    """{"edges": (bins + 1,), "counts": (bins,)} from 0 to `high`, by default the 99 % quantile.

    Larger values count in the last bin.
    """
    if not len(values):
        return None
    high = high or max(float(np.quantile(values, 0.99)), 1e-9)
    counts, edges = np.histogram(np.minimum(values, high), bins=HISTOGRAM_BINS, range=(0, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
