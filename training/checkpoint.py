"""What an interrupted run needs to go on, written so that there is always one whole checkpoint."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from training.errors import TrainError

STATE_FILE = "training_state.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace the run's state. Until the new file is complete the previous one stays.

    Raises:
        TrainError: the disk is full or cannot be written; nothing half written is left.
    """
    draft = folder / f".{STATE_FILE}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / STATE_FILE)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        _drop(draft)
        raise TrainError(f"the checkpoint could not be written to {folder} ({_reason(error)}); {_KEPT}") from error


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state of an interrupted run, None if there is none.

    Raises:
        TrainError: the file is damaged.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise TrainError(f"{path} is damaged ({_reason(error)}); delete it to start again") from error
    return state


def forget_state(folder: Path) -> None:
    """Drop the run's state, where there is one, and the folder if nothing else is in it."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def replace_folder(folder: Path, write: Any) -> None:
    """Let ``write(empty folder)`` make a result, then put its files into ``folder``, each at once.

    Raises:
        TrainError: the disk is full or cannot be written; ``folder`` is as it was.
    """
    draft = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(draft.iterdir()):
            file.replace(folder / file.name)
    except (OSError, RuntimeError) as error:
        raise TrainError(f"the result could not be written to {folder} ({_reason(error)}); {_KEPT}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


_KEPT = "what was there before is unharmed. Free some space, then run the same command again"


def _drop(path: Path) -> None:
    path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
