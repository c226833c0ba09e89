"""Where the measured costs of a model, its drafters and this machine are kept."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import torch

from decoding.auto_planner import AutoPlanner
from decoding.config import EngineConfig
from decoding.costs import FORMAT, CostTable
from decoding.planner import Limits
from decoding.probe import Probe
from decoding.step import Stepper
from models.kernels.build import cache_folder, speed_key

ENOUGH_PAGES = 400  # with which everything can be measured

logger = logging.getLogger("saccade.engine")


def cost_path(config: EngineConfig, folder: Path, device: torch.device, num_pages: int) -> Path:
    """$SACCADE_CACHE/costs or ~/.cache/saccade/costs, and a name made of all that decides what a step costs."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else speed_key()
    facts = [FORMAT, where, torch.__version__, torch.get_num_threads(), config.dtype, config.quantization]
    facts += [config.attention, config.max_depth, config.max_num_seqs, min(num_pages, ENOUGH_PAGES)]
    facts += [config.tensor_parallel_size, config.draft_tensor_parallel_size]
    facts += [*config.speculate, *_files(folder)]
    for text in config.speculate:
        path = Path(text.partition("=")[2].partition(":")[0])
        facts += _files(path) if path.name else []
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:20]
    return cache_folder().parent / "costs" / f"{digest}.json"


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """What a checkpoint's files are, without reading them."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".json", ".bin", ".pt"))
    stats = [(path, path.stat()) for path in files]
    return [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def learn_costs(
    stepper: Stepper, config: EngineConfig, vocab_size: int, folder: Path | None, *, anew: bool = False
) -> None:
    """Give the planner the costs of this machine: from the file, or measured now and written there.

    Nothing happens where the planner weighs nothing: with fixed plans, and without drafters.

    Args:
        folder: the target's; None: the costs of a model that was not loaded are not kept.
        anew: measure even if there is a file.
    """
    planner = stepper.planner
    if not isinstance(planner, AutoPlanner) or not stepper.drafters.members:
        return
    path = (
        None
        if folder is None
        else cost_path(config, folder, stepper.target.device, stepper.cache.prefixes.pool.num_pages)
    )
    table = None if path is None or anew else CostTable.load(path)
    if table is None or set(table.drafters) != set(stepper.drafters.names):
        started = time.perf_counter()
        table = measure_costs(stepper, config, vocab_size)
        if table is None:
            logger.warning(
                "what steps cost was not measured, and prices are guessed: the K/V pool or the context is too small, "
                "or the model breaks down on random tokens"
            )
            return
        logger.info("measured what steps and drafts cost in %.1f s", time.perf_counter() - started)
        try:
            if path is not None:
                table.save(path)
        except OSError as error:
            logger.warning(
                "the measured costs cannot be kept in %s (%s): measured again next time", path, error.strerror
            )
    planner.costs.replace(table)


@torch.inference_mode()
def measure_costs(stepper: Stepper, config: EngineConfig, vocab_size: int) -> CostTable | None:
    """See ``Probe``."""
    limits = Limits(stepper.cache, stepper.drafters.members, config.max_nodes, config.max_depth)
    return Probe(stepper, limits, vocab_size, config.max_num_seqs).measure()
