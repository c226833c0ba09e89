"""``python -m training RECIPE ...`` is ``saccade train``, for torchrun: ``torchrun -m training RECIPE ...``."""

from __future__ import annotations

import logging
import sys

from decoding.errors import SaccadeError
from training.cli import main

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        sys.exit(main(sys.argv[1:]))
    except SaccadeError as error:
        sys.stderr.write(f"saccade: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
