"""What an exported file says beside its graph: all of a detector that is NumPy's part. Plain data, never code."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np

from blemish.detector import TileDetector
from blemish.errors import BlemishError, ExportError
from blemish.normalisation import SpatialNormalisation
from blemish.postprocess import Cleaning, Smoothing
from blemish.preprocess import Preprocess
from blemish.tiling import TileScorer, Tiling

KEY = "blemish"
"""Under which a file's metadata hold the text of its description."""
TILES, SCORE, EXPECTED = "tiles", "score", "expected"
"""The graph's input (b, C, t, t) in [0, 1] and its outputs (b, 1, t, t) and, where the model says what it expects in
pixels, (b, C, t, t)."""
_FORMAT = 1
_SECTIONS = {"image": Preprocess, "tiling": Tiling, "smoothing": Smoothing, "cleaning": Cleaning}

Section = TypeVar("Section")


@dataclass(frozen=True)
class Description:
    """All that makes a tile scorer a detector, but for its calibration.

    about: how the detector was made: config, version, seed, data fingerprint. Nothing is built from it.
    """

    image: Preprocess
    tiling: Tiling
    smoothing: Smoothing
    cleaning: Cleaning
    normalisation: SpatialNormalisation | None
    fingerprint: str
    about: Mapping[str, Any]

    @classmethod
    def of(cls, detector: TileDetector, about: Mapping[str, Any], batch: int) -> Description:
        """Of a detector that scores at most `batch` tiles at once."""
        normalisation = detector.normalisation
        assert normalisation is None or isinstance(normalisation, SpatialNormalisation)
        tiling = Tiling(**asdict(detector.tiling) | {"batch": batch})
        return cls(
            detector.preprocess,
            tiling,
            detector.smoothing,
            detector.cleaning,
            normalisation,
            detector.fingerprint,
            about,
        )

    def detector(self, scorer: TileScorer) -> TileDetector:
        """The detector that these settings make with a scorer, without calibration."""
        return TileDetector(
            scorer=scorer,
            preprocess=self.image,
            tiling=self.tiling,
            smoothing=self.smoothing,
            normalisation=self.normalisation,
            cleaning=self.cleaning,
            fingerprint=self.fingerprint,
            about=self.about,
        )

    def to_text(self) -> str:
        """JSON, which `from_text` reads."""
        arrays = self.normalisation and {
            "shape": list(self.normalisation.location.shape),
            "location": _encoded(self.normalisation.location),
            "scale": _encoded(self.normalisation.scale),
        }
        sections = {name: asdict(getattr(self, name)) for name in _SECTIONS}
        rest = {"fingerprint": self.fingerprint, "normalisation": arrays, "about": dict(self.about)}
        return json.dumps({"format": _FORMAT, **sections, **rest}, allow_nan=False)

    @classmethod
    def from_text(cls, text: str | None, path: Path) -> Description:
        """What `to_text` wrote into the file at `path`; the file may come from anywhere.

        Raises:
            ExportError: there is none, it is damaged, or of another format.
        """
        if not text:
            raise ExportError(f"{path} was not made by `blemish export`: it says nothing of tiling and preprocessing.")
        try:
            content = json.loads(text, parse_constant=_refuse)
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise ExportError(
                    f"{path} is not of the format {_FORMAT}, which this version of blemish reads: export it again."
                )
            sections: dict[str, Any] = {name: _section(kind, content[name]) for name, kind in _SECTIONS.items()}
            arrays, fingerprint, about = (content[name] for name in ("normalisation", "fingerprint", "about"))
            if not isinstance(fingerprint, str) or not isinstance(about, dict):
                raise TypeError
            return cls(**sections, normalisation=arrays and _arrays(arrays), fingerprint=fingerprint, about=about)
        except ExportError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, BlemishError) as error:
            raise ExportError(f"The settings in {path} are damaged: export it again.") from error


def _section(kind: type[Section], values: Mapping[str, Any]) -> Section:
    """An instance whose arguments are numbers, each of the type that it wants."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if isinstance(value, bool) is not (hints[name] is bool) and value is not None:
            raise TypeError(name)
        wanted = hints[name]
        if float in (wanted, *get_args(wanted)):
            wanted = wanted | int
        if not isinstance(value, wanted):
            raise TypeError(name)
    return kind(**values)


def _encoded(values: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode("ascii")


def _arrays(content: Mapping[str, Any]) -> SpatialNormalisation:
    shape = tuple(content["shape"])
    if len(shape) != 2 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(shape)
    values = []
    for name in ("location", "scale"):
        raw = base64.b64decode(content[name], validate=True)
        if len(raw) != 4 * math.prod(shape):
            raise ValueError(name)
        values.append(np.frombuffer(raw, "<f4").reshape(shape).astype(np.float32))
    location, scale = values
    if not (np.isfinite(location).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("scale")
    return SpatialNormalisation(location, scale)


def _refuse(name: str) -> Any:
    raise ValueError(name)
