"""Box IoU as a module of Hugging Face `evaluate`: `evaluate.load("evaluation/box_iou")` from the repository's root."""

import datasets
import evaluate
import numpy as np

from stereovla.evaluation.metrics import box_iou

DESCRIPTION = "Intersection over union of predicted and true boxes, one predicted box for each true one."
INPUTS = """
Args:
    predictions, references: lists of boxes [x_min, y_min, x_max, y_max] in px, the maximum exclusive. A prediction
        without area, such as [0, 0, 0, 0], counts as a miss.
Returns:
    mean_iou: mean over the pairs, 0 to 1.
    accuracy: share of the pairs with an IoU of at least 0.5.
"""


class BoxIoU(evaluate.Metric):
    """Thin wrapper of `evaluation.metrics.box_iou`."""

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.Sequence(datasets.Value("float32"), length=4)
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": box, "references": box}),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        iou = box_iou(np.asarray(predictions), np.asarray(references))
        return {"mean_iou": float(iou.mean()), "accuracy": float((iou >= 0.5).mean())}
