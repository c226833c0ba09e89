"""No code comes from data: a look through the sources for what would run it, or fetch it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVING = ("server", "decoding", "models")
EVERYWHERE = (*SERVING, "training", "benchmarks")

RUNNING = {"eval", "exec", "compile", "__import__"}  # of builtins
SERIALIZERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
FETCHING = {"requests", "httpx", "aiohttp", "urllib.request", "urllib3", "ftplib"}
PICKLE_NAMES = {"UnpicklingError", "PROTO"}  # what tells a pickle, and that torch refused one


def files(packages: tuple[str, ...]) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def faults(source: str) -> Iterator[str]:
    """What a module does that could run or fetch code, as "line: what"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in SERIALIZERS - {"pickle"}:
                    yield f"{node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in SERIALIZERS:
            yield f"{node.lineno}: from {node.module} import"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
            if node.attr not in PICKLE_NAMES:
                yield f"{node.lineno}: pickle.{node.attr}"
        elif isinstance(node, ast.Call):
            yield from _call_faults(node)


def _call_faults(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in RUNNING:
        yield f"{call.lineno}: {name}()"
    if name.endswith("torch.load") and given.get("weights_only") != "True":
        yield f"{call.lineno}: torch.load without weights_only=True"
    if given.get("trust_remote_code", "False") != "False":
        yield f"{call.lineno}: trust_remote_code={given['trust_remote_code']}"
    if given.get("shell", "False") != "False" or name in ("os.system", "os.popen"):
        yield f"{call.lineno}: a shell"
    if given.get("allow_pickle", "False") != "False":
        yield f"{call.lineno}: {name} with allow_pickle"
    if name in ("yaml.load", "yaml.unsafe_load"):
        yield f"{call.lineno}: {name}"


def test_no_module_runs_what_it_reads() -> None:
    assert len(files(EVERYWHERE)) > 100
    found = {str(path.relative_to(ROOT)): list(faults(path.read_text(encoding="utf-8"))) for path in files(EVERYWHERE)}
    assert not {path: what for path, what in found.items() if what}


def test_what_serves_fetches_nothing() -> None:
    """The model hub's own library is asked for models by name when the server starts, and nothing else goes out."""
    found = {str(path.relative_to(ROOT)): fetchers(path.read_text(encoding="utf-8")) for path in files(SERVING)}
    assert not {path: names for path, names in found.items() if names}
    assert fetchers("import urllib.request") == {"urllib.request"}
    assert fetchers("from httpx import get") == {"httpx"}


def fetchers(source: str) -> set[str]:
    """Imported modules that make requests."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name for name in names if name in FETCHING or name.split(".")[0] in FETCHING}


@pytest.mark.parametrize(
    "source",
    [
        "import dill",
        "from pickle import loads",
        "import pickle\npickle.loads(b'')",
        "eval('1')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "subprocess.run(x, shell=True)",
        "np.load(x, allow_pickle=True)",
    ],
)
def test_the_look_would_find_it(source: str) -> None:
    assert len(list(faults(source))) == 1
