"""The verb `diff`: many pairs compared, files and figures out. Objects in; no config, no CLI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from blemish.calibration import Calibration, Promise
from blemish.data.images import probe, read_mask, read_pixels
from blemish.data.splits import digest_files
from blemish.difference.compare import Comparison, Difference
from blemish.difference.outputs import TRUTH, DifferenceFiles, row_of
from blemish.difference.pairs import Pair
from blemish.errors import BlemishError, CalibrationError, DataError, ImageError
from blemish.evaluation.curves import PixelCurves
from blemish.evaluation.metrics import Confusion
from blemish.files import CARD_FILE, write_json
from blemish.mask_rules import MaskRule
from blemish.postprocess import Mask
from blemish.rows import check_apart
from blemish.streaming import map_ahead

_LISTED = 10  # regions of a single pair that are printed
_PIXELS_AHEAD = 2**23  # of queries under way at any time, beyond a single larger one
Result = TypeVar("Result")


@dataclass(frozen=True)
class DiffSummary:
    """What `diff` did, an earlier interrupted run included; `resumed` pairs were done by that.

    rows: of the table, in order. truth: means over the pairs with a mask, as far as they are defined.
    """

    rows: list[dict[str, Any]]
    resumed: int
    truth: dict[str, float]

    @property
    def errors(self) -> list[str]:
        """A sentence for each pair that could not be compared."""
        return [row["error"] for row in self.rows if row["error"]]

    @property
    def different(self) -> int:
        return sum(row["decision"] == "different" for row in self.rows)


def diff(
    comparison: Comparison,
    pairs: Sequence[Pair],
    out: Path,
    made: Mapping[str, Any],
    overwrite: bool = False,
    progress: bool = True,
) -> DiffSummary:
    """Compare pairs and write, below `out`, maps/, masks/, overlays/, side_by_side/, differences.csv and .jsonl.

    Args:
        made: how the results are made; its "fingerprint" and "calibration" must not change while they are unfinished.

    Raises:
        BlemishError: `out` cannot be used. ConfigError: a setting does not fit the images.
    """
    check_apart(out, (path for pair in pairs for path in (pair.query, pair.reference, pair.mask) if path))
    files = DifferenceFiles(out, made, overwrite)
    if comparison.card:
        write_json(out / CARD_FILE, comparison.card.to_dict())
    rows = files.rows.done()
    done = {(row["query"], row["reference"]) for row in rows}
    if done - {(str(pair.query), str(pair.reference)) for pair in pairs}:
        raise BlemishError(
            f"{out} holds unfinished differences of other images: choose another out=, or set overwrite=true."
        )
    todo = [pair for pair in pairs if (str(pair.query), str(pair.reference)) not in done]

    def work(pair: Pair) -> dict[str, Any]:
        try:
            found = _compared(comparison, pair)
            truth = _figures(found, read_mask(pair.mask, found.mask.shape)) if pair.mask else {}
        except ImageError as error:
            return row_of(pair, None, str(error))
        return row_of(pair, found) | files.write_images(pair, found) | truth

    resumed = len(rows)
    bar = tqdm(total=len(pairs), desc="comparing", initial=resumed, unit="pair", disable=not progress or len(pairs) < 2)
    with bar:
        for row in files.rows.append(_each(work, todo)):
            rows.append(row)
            bar.update()
    files.finish()
    means = {name: [row[name] for row in rows if row[name] is not None] for name in TRUTH}
    return DiffSummary(rows, resumed, {name: float(np.mean(values)) for name, values in means.items() if values})


def learn(
    comparison: Comparison,
    pairs: Sequence[Pair],
    promise: Promise,
    mask_rule: MaskRule,
    made: Mapping[str, Any],
    progress: bool = True,
) -> Calibration:
    """Calibrate the threshold on pairs without a defect, exchangeable with those to come; copies of a query count once.

    Raises:
        CalibrationError: too few pairs for the promise, said before any is compared, or a rule that needs no pairs.
        DataError: a pair cannot be compared.
    """
    if mask_rule.name == "parametric_noise":
        raise CalibrationError(
            "calibration.mask_rule=parametric_noise learns nothing of pairs: set threshold.kind=noise instead of "
            "learn=true, or another mask rule."
        )
    units = digest_files([pair.query for pair in pairs], progress)
    promise.rank(len(set(units)), len(pairs))

    def score(pair: Pair) -> float:
        try:
            score_map = _compared(comparison, pair).score_map
        except ImageError as error:
            raise DataError(f"A pair cannot be used. {error}") from error
        mask_rule.check_size(score_map.size, pair.query)
        return mask_rule.score(score_map)

    bar = tqdm(_each(score, pairs), "calibrating", len(pairs), unit="pair", disable=not progress, leave=False)
    return Calibration.fit(list(bar), units, promise, made["fingerprint"], mask_rule, None, made)


def _each(work: Callable[[Pair], Result], pairs: Sequence[Pair]) -> Iterator[Result]:
    """In order, by as many threads as there are cores: OpenCV, NumPy and torch let go of Python's lock."""

    def area(pair: Pair) -> float:
        try:
            sizes = [probe(path) for path in (pair.query, pair.reference)]
        except ImageError:
            return 0
        return max(info.width * info.height for info in sizes)

    return map_ahead(work, pairs, area, _PIXELS_AHEAD)


def _compared(comparison: Comparison, pair: Pair) -> Difference:
    reference, query = read_pixels(pair.reference), read_pixels(pair.query)
    try:
        return comparison(reference, query)
    except ImageError as error:
        raise ImageError(f"{pair.query}: {error}") from error


def _figures(found: Difference, truth: Mask) -> dict[str, float | None]:
    """`TRUTH` of one pair, over the pixels that can be compared."""
    truth, mask = truth[found.valid], found.mask[found.valid]
    both, flagged, true = (int(np.count_nonzero(part)) for part in (truth & mask, mask, truth))
    decisions = Confusion(both, flagged - both, true - both, truth.size - flagged - true + both)
    curves = PixelCurves()
    curves.add(found.score_map[found.valid][None], truth[None])
    figures = (decisions.f1(), decisions.iou(), decisions.precision(), decisions.recall(), curves.curve().auroc())
    return dict(zip(TRUTH, figures, strict=True))


def in_words(summary: DiffSummary, card: Calibration | None = None) -> str:
    """What was found: of one pair in detail, of many as a whole."""
    lines = []
    if len(summary.rows) == 1 and not summary.errors:
        row = summary.rows[0]
        moved = "no motion" if row["motion"] == "identity" else f"{row['motion']}, judged {row['verdict']}"
        lines.append(f"{row['decision']}: {100 * row['share']:.3g} % of the pixels, {row['regions']} regions")
        lines += [
            f"  region of score {score:.3g}: {width} x {height} pixels at ({left}, {top})"
            for (left, top, width, height), score in zip(row["boxes"][:_LISTED], row["region_scores"], strict=False)
        ]
        if row["regions"] > _LISTED:
            lines.append(f"  and {row['regions'] - _LISTED} more, in the table")
        lines.append(f"alignment: {moved}; {100 * row['valid_share']:.3g} % of the query can be compared")
        what = "score" if card else "largest difference"
        lines.append(f"threshold: {row['threshold']:.4g}, {what} {row['image_score']:.4g}")
        if row["p_value"] is not None:
            lines.append(f"p-value: {row['p_value']:.3g}")
    else:
        resumed = f" ({summary.resumed} of them before the interruption)" if summary.resumed else ""
        counts = f"{summary.different} different, {len(summary.errors)} unusable"
        lines.append(f"{len(summary.rows)} pairs{resumed}: {counts}")
    if card:
        lines.append(f"calibrated: {card.in_words()}")
    if summary.truth:
        usable = {name: sum(row[name] is not None for row in summary.rows) for name in summary.truth}
        figures = [f"{name.replace('_', ' ')} {value:.3f} ({usable[name]})" for name, value in summary.truth.items()]
        lines.append(f"against the masks (mean, and over how many pairs): {', '.join(figures)}")
    return "\n".join(lines)
