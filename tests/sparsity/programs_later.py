"""Programs written down when `shrink` was finished, and committed before it was tried on them."""

from __future__ import annotations

import programs_later_sequence
import programs_later_vision
from programs_base import Program

LATER: tuple[Program, ...] = (*programs_later_vision.PROGRAMS, *programs_later_sequence.PROGRAMS)
