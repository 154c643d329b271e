"""Which images a run has seen: what can neither calibrate nor measure it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blemish.errors import CalibrationError

if TYPE_CHECKING:
    from blemish.data.splits import SplitRecord


@dataclass(frozen=True)
class Seen:
    """Images that trained or selected a model. files: their SHA-256. groups: those that they are of."""

    files: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()

    @classmethod
    def of(cls, items: Sequence[SplitRecord]) -> Seen:
        groups = (item.record.group for item in items)
        return cls(frozenset(item.digest for item in items), frozenset(group for group in groups if group is not None))

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> Seen:
        """From what a run says of itself, where `to_dict` is a part of it."""
        return cls(frozenset(about["trained_on"]), frozenset(about["trained_groups"]))

    def to_dict(self) -> dict[str, list[str]]:
        return {"trained_on": sorted(self.files), "trained_groups": sorted(self.groups)}

    def union(self, others: Iterable[Seen]) -> Seen:
        """Of a model whose parts were trained apart."""
        every = [self, *others]
        return Seen(frozenset().union(*(one.files for one in every)), frozenset().union(*(one.groups for one in every)))

    def among(self, items: Iterable[SplitRecord]) -> list[Path]:
        """Those of these images that were seen, or are of a group that was."""
        return [item.record.path for item in items if item.digest in self.files or item.record.group in self.groups]

    def check_apart(
        self, items: Sequence[SplitRecord], run: str | Path, advice: str, part: str = "calibration"
    ) -> None:
        """Raise CalibrationError if images of this part were seen by `run`. advice: what to do, without a full stop."""
        if known := self.among(items):
            raise CalibrationError(
                f"Expected {part} images that no run has seen, found that {len(known)} of {len(items)}, or others of "
                f"their group, took part in the training of {run} (first: {known[0]}): {advice}."
            )
