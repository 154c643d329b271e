"""Figures as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

_OVER_ALL_THRESHOLDS = {
    "images": "images",
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_best_f1_over_thresholds": "best F1*",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro_0.3": "AUPRO@0.3",
    "aupro_0.05": "AUPRO@0.05",
}
_CALIBRATED = {
    "image_precision": "precision",
    "image_recall": "recall",
    "image_f1": "F1",
    "pixel_precision": "pixel precision",
    "pixel_recall": "pixel recall",
    "pixel_dice": "Dice",
    "pixel_iou": "IoU",
}


def metrics_table(metrics: Mapping[str, Any], threshold: str) -> str:
    """The result of `Evaluation.result` as two tables and a sentence; `threshold` says how it was calibrated."""
    groups = [("overall", metrics["overall"]), *metrics["kinds"].items()]
    ranked = [[name, *(_cell(figures[key]) for key in _OVER_ALL_THRESHOLDS)] for name, figures in groups]
    decided = [[name, *(_cell(figures["calibrated"][key]) for key in _CALIBRATED)] for name, figures in groups]
    normals = metrics["normals"]
    lines = [
        table(["over all thresholds", *_OVER_ALL_THRESHOLDS.values()], ranked),
        "* best over all thresholds, chosen with the labels: an upper bound, not what to expect in use",
        "",
        table(["at the calibrated threshold", *_CALIBRATED.values()], decided),
        f"calibrated threshold: {threshold}",
    ]
    if normals["images"]:
        low, high = normals["false_alarm_rate_interval_95"]
        lines.append(
            f"false alarms: {normals['false_alarms']} of {normals['images']} normal images, "
            f"{normals['false_alarm_rate']:.2%} (95 % interval {low:.2%} to {high:.2%})"
        )
    empty = metrics["overall"]["empty_masks"]
    if empty:
        lines.append(f"note: {empty} masks of defective images are empty; their pixels count as defect-free")
    without = metrics["overall"]["images"] - metrics["overall"]["masks"]
    if without:
        lines.append(f"note: {without} defective images have no mask and do not count in pixel figures")
    return "\n".join(lines)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
