"""Documents read from a hub in processes of their own: HF_ENDPOINT is read when huggingface_hub is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import Server

ROOT = Path(__file__).resolve().parents[1]
READ = """
import hashlib, json, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 50)  # the client library's own backoff takes 23 s
from lab.data import corpus, hub
from lab.errors import UserError
from lab.preset import Data
assert "datasets" not in sys.modules and "huggingface_hub" not in sys.modules
hub.SHARD_BYTES = 40_000
seen = []
def progress(*values):
    seen.append(values)
    if "pause" in sys.argv and values[1] > 100_000:
        print("pausing", flush=True)
        sleep(60)
try:
    opened = corpus.open_corpus(Data(**json.loads(sys.argv[1])), progress)
    print(json.dumps({"identity": opened.identity, "train": list(opened.train()), "val": list(opened.val()),
        "labels": sorted({label for label, *_ in seen}), "last": seen[-1:]}))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def preset(**more: object) -> list[str]:
    settings = {"source": "hub", "train_bytes": 300_000, "val_bytes": 10_000, "repo": "owner/stories"}
    settings |= {"train_files": ["big.parquet"], "val_files": ["big.parquet"], "val_documents": [100, 150]}
    return [sys.executable, "-c", READ, json.dumps(settings | {"train_from": 200} | more)]


def environment(server: Server | str, folder: Path, **more: str) -> dict[str, str]:
    """Nothing of this machine's hub settings; home and cache under `folder`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    url = server if isinstance(server, str) else server.url
    own = {"HOME": str(folder / "home"), "AUTORESEARCH_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return inherited | own | {"HF_ENDPOINT": url} | more


def started(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def fetch(hub: "Server | str | Forks", folder: Path, env: dict[str, str] | None = None, **more: object) -> dict:
    done = run_reader(hub, folder, env, **more)
    assert done.stderr == "", done.stderr
    return json.loads(done.stdout)


def refused(hub: "Server | str | Forks", folder: Path, env: dict[str, str] | None = None, **more: object) -> str:
    """The one line on stderr, after which no copy is there that a later run would take for whole."""
    done = run_reader(hub, folder, env, **more)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(folder.glob("cache/text/*/manifest.json"))
    return done.stderr


def run_reader(hub: "Server | str | Forks", folder: Path, env: dict[str, str] | None, **more: object):
    if isinstance(hub, Forks):
        return hub.run(preset(**more)[3], environment(hub.server, folder, **(env or {})), folder)
    return started(preset(**more), environment(hub, folder, **(env or {})))


class Forks:
    """Reader processes that are forked from one that has imported `datasets`, which takes over a second each time."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        command = [sys.executable, "-c", ZYGOTE, READ.replace("assert ", "assert True or ")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment(server, folder), **pipes)

    def run(self, settings: str, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
        folder.mkdir(exist_ok=True)
        out, err = folder / "stdout", folder / "stderr"
        own = {key: env[key] for key in ("AUTORESEARCH_CACHE", "HF_TOKEN") if key in env}
        print(json.dumps([settings, own, str(out), str(err)]), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        return subprocess.CompletedProcess([], code, out.read_text(), err.read_text())


ZYGOTE = """
import json, os, sys
from lab.data import hub
hub._library()
for line in sys.stdin:
    settings, own, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(own)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        program, sys.argv = sys.argv[1], ["-c", settings]
        code = 0
        try:
            exec(compile(program, "reader", "exec"), {"__name__": "__main__"})
        except SystemExit as stop:
            print(stop, file=sys.stderr)
            code = 1
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 2
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
