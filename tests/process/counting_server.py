"""``saccade serve`` with an engine that counts in place of a model.

The folder that it is given is that of the tokenizer.
"""

from __future__ import annotations

import logging
import sys

from server.cli import parse, run_server

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    sys.exit(run_server(parse(["serve", *sys.argv[1:]]), engine="tests.process.counting_engine:CountingEngine"))
