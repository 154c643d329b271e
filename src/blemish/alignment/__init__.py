"""Aligning a reference with a query: the motion between them, their illumination, and whether it helped."""

from blemish.alignment.align import Aligned, Alignment
from blemish.alignment.illumination import compensate
from blemish.alignment.motion import Motion, warp
from blemish.alignment.verdict import Verdict, judge

__all__ = ["Aligned", "Alignment", "Motion", "Verdict", "compensate", "judge", "warp"]
