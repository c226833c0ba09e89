"""A rank after rank 0: ``python -m decoding.rank_process``, started by rank 0 (ranks.py) and ended with it."""

from __future__ import annotations

import argparse
import logging
import sys

import torch

from decoding.parent import end_with_parent
from models.parallel.ranks import RankError, connect
from models.parallel.worker import Worker


def main(argv: list[str] | None = None) -> int:
    """Do what rank 0 announces, until it says stop or is gone."""
    args = _parse(argv)
    end_with_parent(args.parent)
    logging.basicConfig(level=logging.WARNING, format=f"%(levelname)s: rank {args.rank}: %(message)s")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device, whatever its tensors say
    sys.stdout.write("r")  # rank 0 comes to the meeting when all others are on their way
    sys.stdout.close()
    try:
        Worker(connect(args.rank, args.size, args.meeting, device), device).run()
    except RankError as error:
        logging.error("%s", error)
        return 1
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="decoding.rank_process", allow_abbrev=False)
    for name in ("rank", "size", "threads", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("meeting", "device"):
        parser.add_argument(f"--{name}", required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
