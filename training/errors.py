"""What training raises for a user to mend."""

from __future__ import annotations

from decoding.errors import SaccadeError


class TrainError(SaccadeError):
    """Training cannot start or go on; the message says why and what to do."""
