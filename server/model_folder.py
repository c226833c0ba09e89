"""The folder with a model's tokenizer, for the HTTP process; the engine finds the weights itself."""

from __future__ import annotations

from pathlib import Path

from decoding.config import EngineConfig
from decoding.errors import ModelError

_TOKENIZER_FILES = (
    "*.json",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "additional_chat_templates/*",
)


def tokenizer_folder(config: EngineConfig) -> Path:
    """A local folder as it is; of a hub id, the files without the weights, from the local cache or downloaded.

    Raises:
        ModelError: there is neither, or the folder is not a model's.
    """
    name = config.tokenizer or config.model
    if not name.strip():
        raise ModelError("the model has no name; give the folder of a model or a hub id such as org/name")
    folder = Path(name).expanduser()
    if folder.is_dir():
        # said here, since a folder without a model has no tokenizer either, and that would be a riddle
        if config.tokenizer is None and not (folder / "config.json").is_file():
            raise ModelError(f"{name} has no config.json; give the folder of a model, with its weights and tokenizer")
        return folder
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or folder.exists():
        raise ModelError(f"there is no folder {name!r}; give the folder of a model or a hub id such as org/name")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_TOKENIZER_FILES)))
    except (ValueError, OSError) as error:  # bad names, the hub's answers, no connection
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(
            f"there is no folder {name!r}, and the hub did not give out a model of that name ({reason}); check the "
            "name, or give the folder of a model"
        ) from error
