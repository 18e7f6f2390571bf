"""What retrieval progressions do between trainings: mine negatives, choose queries, evaluate."""

from __future__ import annotations

KINDS: dict = {}
