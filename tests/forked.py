"""Commands as people type them, but faster. Importing torch and open_clip takes seconds, a tiny run less than one. So a
command is a process forked from one that has imported them (multiprocessing's forkserver), in which the script then
runs as python would run it. The fixture `start` of conftest.py starts one.
"""
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import REPOSITORY
from safetensors.torch import load_file

import embed
import sspa  # noqa: F401 (so that the forkserver has imported it)

embed.import_open_clip()
RP, SSPA = "adapter_rp.py", "sspa.py"
BOTH = pytest.mark.parametrize("script", [RP, SSPA])
TINY = {RP: "--text-count 300 --test-count 130 --epochs 2 --seed 0 1",
        SSPA: "--tune-image none --train-count 130 --test-count 130 --epochs 2 --seed 0 1"}


def as_script(script, words, folder, stdout, stderr, environment, full_at):
    """`python script words` in a process that has imported torch but nothing of ours. stdout: None is a pipe that
    nobody reads; full_at: the most bytes that a file may hold, as on a full disk."""
    if stdout:
        os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
    else:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="ascii", closefd=False)  # as in a pipe of the locale C
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="ascii", closefd=False)
    if full_at:
        resource.setrlimit(resource.RLIMIT_FSIZE, (full_at, full_at))
    multiprocessing.set_start_method("fork", force=True)  # of DataLoader's processes, as in a process of its own
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background passes on "ignore"
    socket.getaddrinfo = None  # tests use no network
    sys.modules["tensorboard"] = None  # as where it is not installed
    os.environ.update(environment)
    os.chdir(folder)
    for path in REPOSITORY.glob("*.py"):
        sys.modules.pop(path.stem, None)
    sys.argv = [str(REPOSITORY / script), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Running(NamedTuple):
    script: str
    process: multiprocessing.Process
    stdout: Path
    stderr: Path

    def end(self, expect=0):
        """-> (stdout, stderr). A command that fails says why in its last line."""
        self.process.join(100)
        self.process.kill()
        stdout = ""
        if self.stdout and self.stdout.is_file():
            stdout = self.stdout.read_text("utf-8", "surrogateescape")
        stderr = self.stderr.read_text("utf-8")
        told = f"exit code {self.process.exitcode}\n{stdout}\n{stderr}"
        assert self.process.exitcode == expect and "Traceback" not in stderr, told
        assert expect <= 0 or stderr.splitlines()[-1].startswith(f"{self.script}: "), told
        return stdout, stderr

    def wait_for(self, condition, *of):
        deadline = time.monotonic() + 100
        while not condition(*of):
            assert self.process.is_alive() and time.monotonic() < deadline, self.stderr.read_text()
            time.sleep(0.002)


def start_processes(start, *of_each):
    """A command a process, as torchrun starts them -> [Running]"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = str(len(of_each))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return [start(*words, RANK=str(rank), LOCAL_RANK=str(rank), END_SECONDS="0.1", **meeting)
            for rank, words in enumerate(of_each)]


def start_two(start, *words):
    """The same command twice; the second process is silent."""
    first, second = start_processes(start, words, words)
    first.end()
    stdout, stderr = second.end()
    assert not stdout and all(line.startswith("[") for line in stderr.splitlines())  # gloo's own


def read_lines(path):
    """The values in a file of JSON lines"""
    return [json.loads(line) for line in path.read_text("utf-8", "surrogateescape").splitlines()]


def result_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def outcome_of(folder):
    """What a run has computed: its results, every epoch's loss, the model"""
    result = result_of(folder)
    found = {name: result[name] for name in ("runs", "zero_shot_mAP", "linear_probe_mAP", "per_class")}
    found["losses"] = [line["loss"] for line in read_lines(folder / "log.jsonl")]
    found["tensors"] = {name: tensor.tolist() for name, tensor in load_file(folder / "checkpoint.safetensors").items()}
    return found


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
