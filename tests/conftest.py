"""Shared by the tests: where things are, and the real command line as a subprocess."""
import multiprocessing.forkserver
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import scenes

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared/data"
sys.path.append(str(REPOSITORY / "experiments"))  # which some tests import


def table(text):
    """"1 0; 0 1" -> float array [2, 2]"""
    return np.loadtxt(text.split(";"), ndmin=2)


class Bomb:
    """What a pickle may do to whoever loads it: leave a file"""
    def __reduce__(self):
        return open, ("bomb", "w")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The current folder is a temporary one of the test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shared():
    """Real photos, captions and embeddings; tests that need them skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data for tests not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One embedding cache for the whole session."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """command("scenes.py", "draw", folder) -> CompletedProcess of the real script, in a folder elsewhere. Its pipes are
    made as those of a locale that has no letters but ASCII's."""
    def run(script, *words, expect=0, cwd=None):
        done = subprocess.run([sys.executable, REPOSITORY / script, *map(str, words)], capture_output=True, timeout=300,
                              encoding="utf-8", cwd=cwd or tmp_path_factory.mktemp("cwd"),
                              env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == expect, f"exit code {done.returncode}, not {expect}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done
    return run


@pytest.fixture(scope="session")
def start(cache, tmp_path_factory):
    """start("sspa.py", "--epochs 2 --output", path) -> forked.Running, on the CPU, in a folder elsewhere. Words are
    split as a shell would, paths are not; other arguments are those of forked.as_script, or environment variables."""
    import forked  # takes seconds, which only tests that need it shall spend
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{REPOSITORY}:{REPOSITORY / 'tests'}")
        multiprocessing.forkserver.set_forkserver_preload(["forked"])
        multiprocessing.forkserver.ensure_running()

    def begin(script, *words, stdout="stdout", stderr="stderr", full_at=None, **environment):
        place = tmp_path_factory.mktemp("command")
        typed = ["--cache", cache]  # a later --cache overrides it
        for word in words:
            typed += [str(word)] if isinstance(word, Path) else shlex.split(word)
        if "--gpu" not in typed:
            typed.append("--cpu")
        stdout = stdout and place / stdout  # an absolute path stays as it is
        stderr = place / stderr
        process = multiprocessing.get_context("forkserver").Process(
            target=forked.as_script, args=(script, typed, place, stdout, stderr, environment, full_at))
        process.start()
        return forked.Running(script, process, stdout, stderr)
    return begin


@pytest.fixture(scope="session")
def trained(start, tmp_path_factory):
    """{script: a finished run of two seeds}"""
    import forked
    runs = {}
    for script, words in forked.TINY.items():
        folder = tmp_path_factory.mktemp("trained")
        stdout, _ = start(script, words, "--save-all --output", folder).end()
        runs[script] = SimpleNamespace(folder=folder, checkpoint=folder / "checkpoint.safetensors", stdout=stdout)
    return runs


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder: features of four labels, photos with odd names and a torn one, label lists."""
    place = tmp_path_factory.mktemp("place")
    draw = np.random.default_rng(0).random
    np.savez(place / "features.npz", label_names=["cat", "dog", "bus", "tree"], label_embeddings=draw((4, 16)),
             text_embeddings=draw((90, 16)), text_labels=draw((90, 4)).round(),
             image_embeddings=draw((40, 16)), image_labels=draw((40, 4)).round())
    photos = place / "photos"
    (photos / "empty").mkdir(parents=True)
    for row, name in enumerate(("a.png", os.fsdecode(b"caf\xe9 \xff.png"), "ü, 1.jpg")):
        scenes.picture("test", row)[0].save(photos / name)
    (photos / "torn.jpg").write_bytes((photos / name).read_bytes()[:700])
    for name, words in (("few", ["sun", "moon"]), ("foreign", ["cup", "zebra"]), ("new", ["cup", "ball"]),
                        ("seen", scenes.NAMES[:-2]), ("reversed", scenes.NAMES[::-1])):
        (place / f"{name}.txt").write_text("\n".join(words))
    return place
