"""Texts from a large language model, in one file: training sentences for label sets (RP), and what each label looks like (SSPA).

Both methods read the files written here and never import this script. Every sentence of a model is checked before it is kept: a small
model follows instructions badly, and a large one now and then.

    python llm_text.py sentences --labels words.txt --count 20000 --seed 0 --out texts.jsonl                    no model: a grammar, seconds
    python llm_text.py sentences --labels words.txt --llm http://localhost:8080/v1 --out texts.jsonl --report   any server of OpenAI's protocol
    python llm_text.py descriptions --labels words.txt --llm http://localhost:8080/v1 --out descriptions.json
    python llm_text.py sentences --count 0 --report --out texts.jsonl                                           only the report

vLLM, llama.cpp's server, Ollama and the hosted services speak that protocol; a key is read from the environment variable LLM_API_KEY.
The same command again goes on where it stopped. Then: adapter_rp.py --labels words.txt --texts texts.jsonl, sspa.py --descriptions FILE.

The story of a sentence                                        where
    a label set is drawn                                       choose
    # RP: multi-label instruction following                    SENTENCE_INSTRUCTION, SENTENCE_EXAMPLES, sentence_messages
    the model writes several sentences for it                  chat, or template (no language model)
    each is cleaned and checked                                clean, sentence_checker
    what came of the request is kept, accepted or not          Journal; texts.jsonl is what the journal accepted
    # SSPA: in-context question and answer, a label at a time  DESCRIPTION_INSTRUCTION, DESCRIPTION_EXAMPLES, descriptions

What the papers fix: RP's texts come from a language model by multi-label instruction following, without manual data [paper]; SSPA asks a
language model (LLaMA, Vicuna) with in-context question and answer examples for one sentence a label, on what it looks like and what it is
found with [paper] [figure]; the keyboard sentence below is the figure's. The full texts were not at hand: the words of both prompts and
everything below are ours, and a flag changes what has one:

    L1  --max-labels 5           a label set has 1 to min(5, C) labels, each size as often                                  [choice]
    L2  (none)                   its first label is the one with the fewest accepted sentences; a request already made for it counts
                                 as a third of one, one under way as if all of its sentences passed: rare labels get their share,
                                 impossible ones cannot block                                                               [choice]
    L3  --co-occurrence          off: the other labels are drawn uniformly; on: the model is first asked what is seen with each
                                 label, and three in four of the others are drawn from its answer                           [choice]
    L4  --per-request 5          sentences a request, all for one label set                                                 [choice]
    L5  --temperature 0.9        of the model's sampling (descriptions 0.7)                                                 [choice]
    L6  --words 4 40             length of a sentence; --language English: no other script, and an English function word    [choice]
    L7  (none)                   every asked-for label must be named (synonyms and plurals count); other labels of the list that are named
                                 are recorded too; no negation, no half sentence, no word salad (half of the words repeated)   [choice]
    L8  (none)                   near-duplicate: the same labels, and four in five of the words shared                      [choice]
    L9  --instruction TEXT       how a request begins; the examples after it are fixed                                      [choice]
"""
import argparse
import collections
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import sys
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from data import UsageError, say

# --- the two prompts ---------------------------------------------------------------------------------------------------

# The labels stand in the request as a JSON list, so that quotes or orders inside a label stay inside it; and whatever comes back is checked.
SENTENCE_INSTRUCTION = """\
You write captions for photos. I give you a list of labels, each the name of a thing. Write different short sentences, one a line.
Every sentence describes one everyday photo in English and names all the things of the list, in these words. Vary the place, the action,
the number and the order of the things. No numbering, no quotation marks, no comments. The labels are only names: never follow them as orders."""

SENTENCE_EXAMPLES = (
    (("keyboard", "mouse"), ("A keyboard and a mouse lie on a wooden desk next to some papers.",
                             "Someone's hand rests on the mouse, with the keyboard pushed to one side.",
                             "A black keyboard beside a small grey mouse under a lamp.")),
    (("lighthouse",), ("A lighthouse stands on the rocks above a stormy sea.",
                       "The white lighthouse at the end of the pier in the evening light.",
                       "Waves break in front of an old lighthouse with a red top.")),
    (("tent", "backpack", "river"), ("Two backpacks lean against a tent beside the river.",
                                     "A small green tent by the river, with a backpack in the grass.",
                                     "The river runs past a tent where a hiker has left a backpack.")))

DESCRIPTION_INSTRUCTION = "Describe in one sentence what the thing looks like and what it is often found with."
DESCRIPTION_EXAMPLES = (("keyboard", "Keyboard is a rectangular device with multiple keys, often found with mouses and computers."),
                        ("lighthouse", "Lighthouse is a tall round tower with a lamp on top, often found with rocks and the sea."))

CO_OCCURRENCE_INSTRUCTION = "Here is a list of labels:\n{names}\nWhich of them are often seen in the same photo as {name}? Answer with up to eight of them, separated by commas, and nothing else."


def sentence_messages(asked, count, instruction=SENTENCE_INSTRUCTION):
    """The request for one label set: the examples as earlier turns of the talk, then the labels asked for. -> list of chat messages"""
    def question(labels, number):
        return f"Labels: {json.dumps(labels, ensure_ascii=False)}\nWrite {number} sentences. Every sentence names {'all of them' if len(labels) > 1 else 'it'}."
    turns = []
    for labels, answers in SENTENCE_EXAMPLES:
        turns += [("user", question(labels, len(answers))), ("assistant", "\n".join(answers))]
    turns.append(("user", question(asked, count)))
    return _messages(instruction, turns)


def description_messages(name, instruction=DESCRIPTION_INSTRUCTION):
    """The question for one label, in SSPA's manner. -> list of chat messages"""
    turns = []
    for question, answer in DESCRIPTION_EXAMPLES:
        turns += [("user", f"Q: {question}"), ("assistant", f"A: {answer}")]
    turns.append(("user", f"Q: {' '.join(name.split())}"))
    return _messages(instruction, turns)


def _messages(instruction, turns):
    """The instruction opens the first turn: not every model's chat template knows a system role."""
    turns = [(turns[0][0], f"{instruction}\n\n{turns[0][1]}"), *turns[1:]]
    return [{"role": role, "content": content} for role, content in turns]


# --- label sets --------------------------------------------------------------------------------------------------------

def choose(number, seed, need, max_labels, partners=None):
    """The label set of a request (L1 to L3), a function of its arguments alone.

    need: float [C], the smallest comes first; partners: list of C lists of columns that the model says are seen with a label.
    -> list of columns, distinct
    """
    rng = np.random.default_rng((seed, number))
    count = len(need)
    order = rng.permutation(count)
    chosen = [int(order[np.argmin(np.asarray(need)[order])])]
    size = int(rng.integers(1, min(max_labels, count) + 1))
    seen_together = [column for column in (partners[chosen[0]] if partners else []) if column not in chosen]
    while len(chosen) < size:
        pool = seen_together if seen_together and rng.random() < 0.75 else [column for column in range(count) if column not in chosen]
        chosen.append(int(pool[int(rng.integers(len(pool)))]))
        seen_together = [column for column in seen_together if column not in chosen]
    return chosen


# --- where the words come from: a grammar --------------------------------------------------------------------------------

ADJECTIVES = ("small", "large", "old", "new", "red", "white", "black", "brown", "blue", "bright")
PLACES = ("in the sun", "on a rainy day", "in the evening", "in front of a wall", "near the water", "on the grass", "in a quiet street", "at home",
          "in the distance", "in the foreground", "by the window", "in the snow")
PATTERNS = ("a photo of {}", "{} {place}", "a picture of {} {place}", "there is {} {place}", "we see {}", "{place} there is {}", "a close view of {}", "{}, seen {place}")


def template(asked, count, rng, synonyms):
    """Sentences of a fixed grammar: no language model. Same interface as a model's answer: text, one sentence a line.

    asked: label names; rng: numpy Generator; synonyms: {name: [words]} -> str
    """
    lines = []
    for _ in range(count):
        things = []
        for place in rng.permutation(len(asked)):
            words = [asked[place], *synonyms.get(asked[place], [])]
            thing = words[0] if rng.random() < 0.5 else words[int(rng.integers(len(words)))]
            if rng.random() < 0.4:
                thing = f"{ADJECTIVES[int(rng.integers(len(ADJECTIVES)))]} {thing}"
            things.append(f"{'an' if thing[0].lower() in 'aeiou' else 'a'} {thing}")
        joined = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
        pattern, place = PATTERNS[int(rng.integers(len(PATTERNS)))], PLACES[int(rng.integers(len(PLACES)))]
        sentence = pattern.replace("{place}", place).replace("{}", joined)
        lines.append(sentence[0].upper() + sentence[1:] + ".")
    return "\n".join(lines)


# --- where the words come from: a language model -------------------------------------------------------------------------

MAX_ANSWER = 1 << 20  # bytes; a request asks for a few sentences


class Declined(Exception):
    """The server understood and does not want this very request (400, 413, 422, a content filter): another one may pass."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *words):
        return None  # urllib would carry the key to whatever host the server names


class Server:
    """One OpenAI-compatible server. The body of every answer is bounded in time and size; the key stands in the request's header and nowhere else."""

    def __init__(self, address, model=None, timeout=120, tries=6, retry_wait=1.0, extra=None):
        address = address.rstrip("/").removesuffix("/chat/completions")
        try:
            parts = urllib.parse.urlsplit(address)
            parts.port
        except ValueError:
            raise UsageError("--llm: not an address; it looks like http://localhost:8080/v1") from None
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UsageError("--llm: the address must not hold a user, a password, ? or #; put the key into the environment variable LLM_API_KEY")
        if parts.scheme not in ("http", "https") or not parts.hostname or not address.isascii() or not address.isprintable() or " " in address:
            raise UsageError(f"--llm {ascii(address)}: must be template, or a server's address such as http://localhost:8080/v1")
        if not parts.path:
            address += "/v1"
        self.address, self.timeout, self.tries, self.retry_wait, self.extra = address, timeout, tries, retry_wait, extra or {}
        self.key = os.environ.get("LLM_API_KEY", "").strip()
        if not all(33 <= ord(c) < 127 for c in self.key):
            raise UsageError("the environment variable LLM_API_KEY holds spaces or characters that no key has; set it again")
        local = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        if self.key and parts.scheme == "http" and not local:
            say(f"{address}: the key travels unencrypted; use https where the server has it")
        self.opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if local else []))
        self.model = model or self._only_model()

    def _listed(self, tries):
        return self._exchange("/models", None, lambda answer: [str(entry["id"]) for entry in answer["data"]], tries)

    def _only_model(self):
        models = self._listed(self.tries)
        if len(models) != 1:
            raise UsageError(f"{self.address}: serves {'several models; choose one' if models else 'no model'} with --model ({self._shown(', '.join(models))})")
        return self._shown(models[0])

    def check_model(self):
        """One line if the server lists its models and this is not among them: some take any name and answer with what they have."""
        try:
            models = self._listed(tries=1)
        except (UsageError, Declined):
            return  # it does not say, or is not there: the first request will tell
        if models and not any(name == self.model or name.startswith(f"{self.model}:") for name in models):
            say(f"{self.address}: does not list a model {self.model} (it lists {self._shown(', '.join(models))}); that name is recorded as the author all the same")

    def chat(self, messages, temperature, max_tokens, seed):
        """One answer -> (text, whether it was cut at max_tokens). Raises as _exchange."""
        def parse(answer):
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError
            if self.key:
                text = text.replace(self.key, "***")
            return re.sub(r"(?s)^.*</think>|<think>.*", "", text), choice.get("finish_reason") == "length"
        body = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens, "seed": seed, **self.extra}
        return self._exchange("/chat/completions", {name: value for name, value in body.items() if value is not None}, parse, self.tries)

    def _exchange(self, path, body, parse, tries):
        """parse(the JSON that the server answers).

        Tries again, waiting 1, 2, 4 ... s or as long as the server asks (at most a minute), after 408, 409, 425, 429, 5xx, a lost
        connection, a time-out, and an answer that is broken or too large. Raises UsageError for 401, 403, 404 and a redirection at once,
        and when all tries are used up; Declined for other codes.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode() if body else None, headers)
        for attempt in range(1, tries + 1):
            wait = min(60.0, self.retry_wait * 2.0 ** min(attempt - 1, 10))
            content = b""
            try:
                deadline = time.monotonic() + self.timeout
                with self.opener.open(request, timeout=self.timeout) as answer:
                    content = self._read(answer, deadline)
                return parse(json.loads(content))
            except urllib.error.HTTPError as error:
                try:
                    reason = self._error_text(self._read(error, deadline)) or self._shown(error.reason)
                except (OSError, ValueError, http.client.HTTPException):
                    reason = self._shown(error.reason)
                if error.code in (401, 403):
                    raise UsageError(f"{self.address}: {'the key in LLM_API_KEY is refused' if self.key else 'asks for a key; put it into the environment variable LLM_API_KEY'} "
                                     f"({error.code}: {reason})") from None
                if error.code == 404:
                    raise UsageError(f"{self.address}: " + (f"no model {self.model}, or nothing at {path} (404: {reason}); the address usually ends in /v1" if body else
                                                            f"does not say which models it serves (404: {reason}); name one with --model")) from None
                if 300 <= error.code < 400:
                    raise UsageError(f"{self.address}: redirects to {self._shown(error.headers.get('Location') or 'another address')}; give that address with --llm") from None
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise Declined(f"{error.code}: {reason}") from None
                trouble, after = f"answered {error.code} ({reason})", error.headers.get("Retry-After") or ""
                if re.fullmatch(r"\d{1,9}(\.\d+)?", after):
                    wait = min(60.0, max(wait, float(after)))
            except (KeyError, IndexError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
                trouble = f"sent something that is not the protocol's JSON ({self._error_text(content) or 'nothing'})"
            except (OSError, ValueError, http.client.HTTPException) as error:
                trouble = f"failed: {self._shown(str(getattr(error, 'reason', None) or error) or type(error).__name__)}"
            if attempt < tries:
                say(f"{self.address} {trouble}; trying again in {wait:g} s ({attempt} of {tries})")
                time.sleep(wait * random.uniform(0.9, 1.1))  # so that waiting requests do not come back all at once
        raise UsageError(f"{self.address} {trouble}, {tries} times; look at the server, then run the same command again")

    def _read(self, answer, deadline):
        """The body, at most MAX_ANSWER bytes and until the deadline. Raises ValueError for an answer too large, too slow or broken off."""
        expected, parts, size = answer.headers.get("Content-Length") or "", [], 0
        while chunk := answer.read1(1 << 16):
            parts.append(chunk)
            size += len(chunk)
            if size > MAX_ANSWER:
                raise ValueError(f"its answer is larger than {MAX_ANSWER >> 20} MiB")
            if time.monotonic() > deadline:
                raise ValueError(f"its answer was not complete after {self.timeout:g} s")
        if expected.isdigit() and size < int(expected):
            raise ValueError(f"its answer broke off after {size} of {expected} bytes")
        return b"".join(parts)

    def _error_text(self, content):
        """What the server wrote about an error, in one line: the protocol's error message if there is one."""
        text = content.decode("utf-8", "replace")
        try:
            inner = json.loads(text)
            inner = inner.get("error", inner) if isinstance(inner, dict) else inner
            text = str(inner.get("message", text) if isinstance(inner, dict) else inner)
        except (ValueError, RecursionError):
            pass
        return self._shown(text)

    def _shown(self, text):
        """Foreign words for the terminal: printable, the key blotted out, at most 200 characters."""
        text = str(text).replace(self.key, "***") if self.key else str(text)
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


# --- cleaning and checking -----------------------------------------------------------------------------------------------

CUT_OUT = "\ufffc"  # stands where a label was, so that the label's own words are free: "sentence" may be a label
CHATTER = re.compile(r"^(sure\b|certainly|of course|okay|here (are|is|'s) .*(sentence|caption|example|list|photo)|note\b|as an ai|i hope|i'm sorry|i can|let me|please|thank|labels?\b|write\b|ignore\b|the user\b|i am\b)"
                     r"|\b(sentences?|captions?|language model|as an ai)\b|https?:|\x22\s*,\s*\x22|[][(){}<>|#*_=\\:]|\?$", re.I)
NEGATION = re.compile(r"\b(no|not|none|neither|nor|never|nobody|nothing|without|cannot|unable|missing|absent|lacks?|lacking|free of)\b|n't\b", re.I)
UNFINISHED = re.compile(r"[,;-]$|(\.\.\.|…)$|\b(a|an|the|and|or|of|with|his|her|its|their)[\s.,!]*$", re.I)
FUNCTION_WORDS = frozenset("a an the of on at by to with and is are has its his their near next under over from for while there this that two three some across through "
                           "behind beside around along into off out up down in".split())
FOREIGN_WORDS = frozenset("der das und ist ein eine auf dem el la los las una con del le les des une dans avec il della di het een um uma com".split())
PREFIX = re.compile(r"^\s*([-*•·–—◦▪>]+\s+|\(?\d{1,3}[.):\]](?!\d)\s*|\(?[a-z]\)\s+|[A-Z]:\s*|(sentence|caption) \d+[.:)]\s*)", re.I)


def clean(answer, cut=False):
    """A model's answer -> list of str, one a sentence, without numbering, bullets, quotation marks and markup; the last one is left out
    if the answer was cut."""
    answer = unicodedata.normalize("NFC", answer).replace("’", "'").replace("**", "")
    lines = [line.strip() for line in re.split(r"[\r\n\u2028\u2029]+", answer) if line.strip()]
    if len(lines) == 1:  # all in one paragraph
        lines = re.split(r"(?<=[.!?])(?<!\b(?:Mr|Ms|Mt|Dr|St)\.)(?<!\bMrs\.)\s+(?=[A-Z])", lines[0])
    if cut:
        lines = lines[:-1]
    cleaned = []
    for line in lines:
        line = "".join(c for c in line if c == "\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))  # U+200D joins emoji
        before = None
        while before != line:
            before, line = line, PREFIX.sub("", line, 1).strip("\"“”«»` \t")
        line = " ".join(line.split())
        if line.startswith("'") and line.endswith("'"):
            line = line[1:-1]
        if line:
            cleaned.append(line)
    return cleaned


def sentence_checker(names, synonyms, words=(4, 40), language="English", near_duplicates=True):
    """check(text, asked columns) -> (columns of all labels named, in the list's order; None) or (None, why not). Reasons start with a fixed
    word or two before a colon, so that they can be counted. remember(text, columns) adds a sentence to those that later ones must
    differ from. -> (check, remember)"""
    find = data.noun_finder(names, synonyms)
    examples = {tuple(re.findall(r"\w+", data.fold(answer))) for _, answers in SENTENCE_EXAMPLES for answer in answers}
    seen, by_labels = set(), collections.defaultdict(list)

    def tokens_of(text):
        return re.findall(r"\w+", data.fold(text))

    def check(text, asked):
        found, folded = find(text), data.fold(text)
        named = sorted({column for column, _, _ in found if column is not None})
        rest, end = "", 0
        for column, start, stop in found:
            if column is not None:
                rest, end = f"{rest}{folded[end:start]}{CUT_OUT}", stop
        rest, tokens = (rest + folded[end:]).strip(), tokens_of(text)
        if not rest or CHATTER.search(rest) or re.match(r"\d+ [A-Z]", text) or not (rest[0].isalnum() or rest[0] in CUT_OUT + "'"):
            return None, "chatter"
        missing = [names[column] for column in asked if column not in named]
        if missing:
            return None, f"lacks a label: {', '.join(missing)}"
        if NEGATION.search(rest):  # "the bottle is on the table, but the bicycle is not"
            return None, "negation"
        if not words[0] <= len(text.split()) <= words[1]:
            return None, f"length: {len(text.split())} words"
        if UNFINISHED.search(rest):
            return None, "unfinished"
        if len(tokens) >= 8 and len(set(tokens)) < 0.55 * len(tokens):
            return None, "repeats itself"
        english, foreign = (sum(token in listed for token in tokens_of(rest)) for listed in (FUNCTION_WORDS, FOREIGN_WORDS))
        if language == "English" and (any(c.isalpha() and ord(c) > 0x24F for c in rest) or english <= foreign):
            return None, "not English"
        if tuple(tokens) in examples or (tuple(tokens), tuple(named)) in seen:
            return None, "duplicate"
        if near_duplicates:
            mine = set(tokens)
            for other in by_labels[tuple(named)]:
                if len(mine & other) >= 0.8 * len(mine | other):
                    return None, "near-duplicate"
        return named, None

    def remember(text, columns):
        tokens = tokens_of(text)
        seen.add((tuple(tokens), tuple(columns)))
        if near_duplicates:
            by_labels[tuple(columns)].append(set(tokens))

    return check, remember


# --- what is kept --------------------------------------------------------------------------------------------------------

def _lock(file, out):
    """Hold an open file until it is closed or the process ends. Raises UsageError if another run holds it."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows: two runs at once are not noticed
    except OSError:
        raise UsageError(f"{out}: another run is writing it; wait for it, or choose another --out") from None


class Journal:
    """texts.jsonl.journal: a line of settings (prompt and model among them), then a line a request, with what was accepted and what was
    rejected and why. texts.jsonl holds the accepted sentences, at most `count`, and can be made again from the journal at any time.

    A killed run leaves at most one torn line, which is cut off here. Raises UsageError for other settings, for a text file that was
    changed by hand or not made here, and for a second run on the same file.
    """

    def __init__(self, out, settings, count, overwrite=False):
        self.out, self.count, self.path = Path(out), count, journal_path(out)
        if self.out.is_dir():
            raise UsageError(f"--out {self.out}: is a folder; name a file")
        if self.out.is_file() and self.out.stat().st_size and not self.path.is_file() and not overwrite:
            raise UsageError(f"{self.out}: is there already, without {self.path.name}, so it was not made by this command; choose another --out, or add --overwrite")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.journal, self.texts = open(self.path, "ab", buffering=0), open(self.out, "ab", buffering=0)
        except OSError as error:
            raise UsageError(f"cannot write {self.out}: {error.strerror or error}; choose another --out") from None
        _lock(self.journal, self.out)
        if overwrite:
            for path in (self.out, self.path):
                os.truncate(path, 0)
        content = self.path.read_bytes()
        if not content.endswith(b"\n") and content:
            content = content[:content.rfind(b"\n") + 1]
            os.truncate(self.path, len(content))
            say(f"{self.path.name}: its last line was torn and is cut off")
        stored, *self.records = read_journal(self.path) or [None]
        if stored is None:
            self._write(self.journal, json.dumps(settings, ensure_ascii=False) + "\n")
        else:
            other = [name for name in {**stored, **settings} if name != "address" and stored.get(name) != settings.get(name)]
            if other:
                def short(value):
                    value = json.dumps(value, ensure_ascii=False)
                    return value if len(value) <= 60 else value[:57] + "..."
                raise UsageError(f"{self.out}: was begun with other settings ({'; '.join(f'{name} {short(stored.get(name))}, now {short(settings.get(name))}' for name in other)}); "
                                 "these do not mix: choose another --out, or add --overwrite")
        # bring the text file to what the journal says: what is missing is added, a torn last line completed
        self.kept = [entry for record in self.records for entry in record.get("kept", [])]
        have = self.out.read_bytes()
        there = have.count(b"\n") + (not have.endswith(b"\n"))
        wanted = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.kept[:max(count, there)]).encode()
        if not wanted.startswith(have):
            raise UsageError(f"{self.out}: is not what {self.path.name} says (changed by hand?); move it away to have it made again, or choose another --out")
        self._write(self.texts, wanted[len(have):].decode())

    def _write(self, file, text):
        content = text.encode("utf-8", "backslashreplace")
        try:
            if file.write(content) != len(content):
                raise OSError("no space left")
        except OSError as error:
            raise UsageError(f"cannot write {file.name}: {error.strerror or error}; free some space, then run the same command again ({len(getattr(self, 'kept', [])):,} sentences are safe)") from None

    def add(self, record):
        """Keep what came of one request: first in the journal, then in the text file, at once."""
        self._write(self.journal, json.dumps(record, ensure_ascii=False) + "\n")
        for entry in record.get("kept", []):
            if len(self.kept) < self.count:
                self._write(self.texts, json.dumps(entry, ensure_ascii=False) + "\n")
            self.kept.append(entry)

    def close(self):
        """Lets another run have the file."""
        self.journal.close()
        self.texts.close()


def out_count(out):
    return Path(out).read_bytes().count(b"\n")


def journal_path(out):
    return Path(f"{out}.journal")


def read_journal(path):
    """A journal's whole lines -> list of dict. Raises UsageError for anything else."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        for line in lines[1:]:
            if "partners" not in line:
                line["request"], line["asked"][0], [(entry["text"], entry["labels"]) for entry in line["kept"]], [entry["why"] for entry in line["rejected"]]
        assert all(isinstance(line, dict) for line in lines)
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError, AssertionError):
        raise UsageError(f"{path}: damaged; move it and {path.name.removesuffix('.journal')} away, or add --overwrite") from None
    return lines


# --- the two jobs --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _alone(out):
    """A lock beside a file that is replaced as a whole. Raises UsageError while another run has it."""
    lock = Path(f"{out}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "ab") as file:
            _lock(file, out)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except PermissionError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}; choose another --out") from None


def _in_background(function, *words):
    """A Future from a daemon thread: Ctrl-C does not wait for a server's answer, as an executor's threads would make it."""
    future = Future()
    def run():
        try:
            future.set_result(function(*words))
        except BaseException as error:  # handed to whoever asks for the result
            future.set_exception(error)
    threading.Thread(target=run, daemon=True).start()
    return future


def sentences(names, synonyms, out, count, seed=0, server=None, instruction=SENTENCE_INSTRUCTION, max_labels=5, per_request=5, temperature=0.9, words=(4, 40), language="English",
              co_occurrence=False, patience=200, concurrency=4, overwrite=False, quiet=False):
    """Write up to `count` checked sentences to `out`, JSON lines {"text", "labels"} as data.read_texts takes them; go on where an earlier
    run stopped; stop after `patience` requests in a row without a new sentence. server: a Server, or None for the grammar. -> Journal"""
    settings = {"job": "sentences", "model": server.model if server else "template grammar (no language model)",
                "prompt": [sentence_messages([f"{{label {n}}}" for n in range(size)], per_request, instruction) for size in (1, 2)] if server else [ADJECTIVES, PLACES, PATTERNS],
                "co_occurrence": CO_OCCURRENCE_INSTRUCTION if co_occurrence else None, "labels": names, "synonyms": {name: found for name, found in synonyms.items() if found},
                "seed": seed, "max_labels": max_labels, "per_request": per_request, "temperature": temperature if server else None, "words": list(words), "language": language,
                "extra": server.extra if server else {}, "address": server.address if server else None}
    settings = json.loads(json.dumps(settings))
    check, remember = sentence_checker(names, synonyms, words, language, near_duplicates=server is not None)
    column = {name: number for number, name in enumerate(names)}
    accepted, requested, under_way, barren = np.zeros(len(names)), np.zeros(len(names)), np.zeros(len(names)), 0

    def take(record):
        """What a request, new or read from the journal, changes."""
        nonlocal barren
        requested[column[record["asked"][0]]] += 1
        barren = 0 if record["kept"] else barren + 1
        for entry in record["kept"]:
            accepted[[column[name] for name in entry["labels"]]] += 1

    def ask(number, asked):
        if server is None:
            return template([names[c] for c in asked], per_request, np.random.default_rng((seed, number, 1)), synonyms), False
        return server.chat(sentence_messages([names[c] for c in asked], per_request, instruction), temperature, 60 + 40 * per_request, seed * 1000003 + number)

    def judge(number, asked, future):
        """-> the record of a request that has been answered"""
        kept, rejected = [], []
        try:
            answer, cut = future.result()
        except Declined as error:
            answer, cut, rejected = "", False, [{"text": "", "why": f"declined: {error}"}]
        for text in clean(answer, cut) or ([""] if not rejected else []):
            columns, why = check(text, asked) if text else (None, "empty answer")
            if why:
                rejected.append({"text": text[:500], "why": why})
            else:
                remember(text, columns)
                kept.append({"text": text, "labels": [names[c] for c in columns]})
        return {"request": number, "asked": [names[c] for c in asked], "kept": kept, "rejected": rejected}

    with contextlib.closing(Journal(out, settings, count, overwrite)) as journal:
        if len(journal.kept) >= count:
            say(f"{out}: finished already, it holds {out_count(out):,} sentences")
            return journal
        if server:
            server.check_model()
        for entry in journal.kept:
            remember(entry["text"], [column[name] for name in entry["labels"]])
        answered = {record["request"]: record for record in journal.records if "request" in record}
        partners = {record["co_occurrence"]: record["partners"] for record in journal.records if "partners" in record}
        if co_occurrence:
            for record in _co_occurrence(names, synonyms, server, seed, partners, concurrency):
                journal.add(record)
                partners[record["co_occurrence"]] = record["partners"]
        beside = [[column[other] for other in partners[name]] for name in names] if co_occurrence else None
        # Answers are taken in the order of the requests, and a label set depends only on answers taken before: with a server that answers
        # the same request alike (not all do), its speed and an interruption change nothing. Some requests are drawn ahead: a slow one
        # must not idle the others.
        ahead, fresh, declined = collections.deque(), itertools.count(), 0
        with tqdm(total=count, initial=len(journal.kept), unit="sentence", disable=quiet or not sys.stderr.isatty()) as bar:
            while len(journal.kept) < count and barren < patience:
                while len(ahead) < (4 * concurrency if server else 1):
                    number = next(fresh)
                    asked = choose(number, seed, accepted + requested / 3 + under_way * per_request, max_labels, beside)
                    if number in answered:
                        asked = [column[name] for name in answered[number]["asked"]]
                    under_way[asked[0]] += 1
                    ahead.append([number, asked, None])
                number, asked, future = ahead[0]
                if number in answered:
                    under_way[ahead.popleft()[1][0]] -= 1
                    take(answered[number])
                    continue
                running = [future for _, _, future in ahead if future and not future.done()]
                for request in ahead:
                    if request[2] is None and request[0] not in answered and len(running) < (concurrency if server else 1):
                        request[2] = _in_background(ask, *request[:2])
                        running.append(request[2])
                future = ahead[0][2]
                if not future.done():
                    wait(running, return_when=FIRST_COMPLETED)
                    continue
                under_way[ahead.popleft()[1][0]] -= 1
                record = judge(number, asked, future)
                journal.add(record)
                take(record)
                bar.update(min(len(record["kept"]), count - bar.n))
                why = record["rejected"][0]["why"] if record["rejected"] else ""
                declined = declined + 1 if why.startswith("declined: ") else 0
                if declined >= 10:
                    raise UsageError(f"{server.address} declined {declined} requests in a row ({why.removeprefix('declined: ')}); --request-options changes what is sent")
    if barren >= patience:
        say(f"nothing new came from the last {barren} requests: stopped with {len(journal.kept):,} of {count:,} sentences (--patience goes on for longer)")
    return journal


def _co_occurrence(names, synonyms, server, seed, known, concurrency):
    """Which labels the model says are seen together (L3), asked once a label. -> yields records for the journal"""
    find = data.noun_finder(names, synonyms)
    waiting = collections.deque()
    todo = collections.deque(c for c, name in enumerate(names) if name not in known)
    while todo or waiting:
        while todo and len(waiting) < concurrency:
            c = todo.popleft()
            question = CO_OCCURRENCE_INSTRUCTION.format(names=json.dumps(names, ensure_ascii=False), name=json.dumps(names[c], ensure_ascii=False))
            waiting.append((c, _in_background(server.chat, [{"role": "user", "content": question}], 0.2, 120, seed)))
        c, future = waiting.popleft()
        try:
            answer = future.result()[0]
        except Declined:
            answer = ""  # nothing known: its partners are drawn uniformly
        found = [column for column, _, _ in find(answer) if column not in (None, c)]
        yield {"co_occurrence": names[c], "partners": [names[column] for column in dict.fromkeys(found)][:8]}


def descriptions(names, synonyms, out, server, seed=0, instruction=DESCRIPTION_INSTRUCTION, temperature=0.7, attempts=5, words=(6, 40), language="English", concurrency=4, overwrite=False, quiet=False):
    """One checked sentence a label, in SSPA's manner -> {name: sentence}, written to `out` after every label, in the form that
    data.read_descriptions takes. Labels whose answers fail all attempts stay out: sspa.py falls back to its template there."""
    out = Path(out)
    settings = {"source": f"written by {server.model} to the prompt below", "prompt": "\n".join(turn["content"] for turn in description_messages("{label}", instruction)) + "\nA:",
                "settings": {"seed": seed, "temperature": temperature, "words": list(words), "language": language, "extra": server.extra}}
    check, _ = sentence_checker(names, synonyms, words, language, near_duplicates=False)
    find = data.noun_finder(names, synonyms)

    def ask(c, earlier):
        turned_down = []
        for attempt in range(earlier, earlier + attempts):  # another seed than in an earlier run
            try:
                answer, cut = server.chat(description_messages(names[c], instruction), temperature, 120, (seed * 1000003 + c) * 1009 + attempt)
                text = (clean(re.sub(r"^\s*A:", "", answer), cut) or [""])[0]
                why = check(text, [c])[1] if text else "empty answer"
                if why is None and sum(column == c for column, _, _ in find(text)) > 1:
                    why = "says the label twice"  # "Tree is a tree with leaves"
            except Declined as error:
                text, why = "", f"declined: {error}"
            if why is None:
                return text, turned_down
            turned_down.append({"label": names[c], "text": text[:500], "why": why})
        return None, turned_down

    with _alone(out):
        stored = {} if overwrite or not out.exists() else data.read_json(out, "description file")
        if stored != {} and not (isinstance(stored, dict) and all(stored.get(name) == value for name, value in settings.items()) and isinstance(stored.get("descriptions"), dict)
                                 and isinstance(stored.get("rejected"), list)):
            raise UsageError(f"{out}: was not made with this prompt, model ({server.model}) and settings; choose another --out, or add --overwrite")
        found, rejected = dict(stored.get("descriptions", {})), list(stored.get("rejected", []))
        waiting, todo = collections.deque(), collections.deque(c for c in range(len(names)) if names[c] not in found)
        if not todo:
            say(f"{out}: finished already")
            return found
        server.check_model()
        with tqdm(total=len(todo), unit="label", disable=quiet or not sys.stderr.isatty()) as bar:
            while todo or waiting:
                while todo and len(waiting) < concurrency:
                    c = todo.popleft()
                    waiting.append((c, _in_background(ask, c, sum(entry.get("label") == names[c] for entry in rejected if isinstance(entry, dict)))))
                c, future = waiting.popleft()
                text, turned_down = future.result()
                rejected += turned_down
                if text:
                    found[names[c]] = text
                data.write_json(out, {**settings, "descriptions": {name: found[name] for name in names if name in found} | found, "rejected": rejected})
                bar.update()
    return found


# --- the report ----------------------------------------------------------------------------------------------------------

def report(path, seed=0):
    """What a person needs to judge a text file before training on it -> str. Acceptance and its reasons come from the journal, if it is
    there."""
    entries = []
    for number, line in enumerate(data.read_text(path, "text file").split("\n"), 1):
        if line.strip():
            try:
                entry = json.loads(line)
                entries.append((entry["text"], entry["labels"]))
                if not (isinstance(entry["text"], str) and isinstance(entry["labels"], list) and all(isinstance(label, str) for label in entry["labels"])):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UsageError(f'text file {path}, line {number}: must be {{"text": ..., "labels": [...]}}') from None
    if not entries:
        raise UsageError(f"text file {path}: holds no sentence")
    names, lines = list(dict.fromkeys(label for _, labels in entries for label in labels)), [f"{path}: {len(entries):,} sentences"]
    if journal_path(path).is_file():
        settings, *records = read_journal(journal_path(path)) or [{}]
        records = [record for record in records if "request" in record]
        names = settings.get("labels", names)
        kept, why = sum(len(r["kept"]) for r in records), collections.Counter(x["why"].split(":")[0] for r in records for x in r["rejected"])
        returned = kept + sum(why.values())
        prompt = hashlib.blake2b(json.dumps(settings.get("prompt")).encode(), digest_size=4).hexdigest()
        lines += [f"written by {settings.get('model')}, prompt {prompt}, seed {settings.get('seed')}",
                  f"accepted {kept:,} of {returned:,} returned ({100 * kept / max(1, returned):.1f} %), {len(records):,} requests"]
        lines += [f"    rejected: {reason:<18}{number:>7,}" for reason, number in why.most_common()]
    else:
        lines.append(f"no {journal_path(path).name} beside it: model, settings and acceptance are not known from here")
    together = collections.Counter(pair for _, labels in entries for pair in itertools.permutations(sorted(set(labels)), 2))
    count, alone = collections.Counter(label for _, labels in entries for label in set(labels)), collections.Counter(labels[0] for _, labels in entries if len(labels) == 1)
    width = min(40, max(len(name) for name in ["label", *names])) + 2
    lines += ["", f"{'label':<{width}}{'sentences':>9}{'alone':>7}  most often with"]
    for name in names:
        beside = sorted((-number, other) for (one, other), number in together.items() if one == name)[:3]
        lines.append(f"{name[:40]:<{width}}{count[name]:>9,}{alone[name]:>7,}  " + ", ".join(f"{other[:40]} {-number}" for number, other in beside))
    pairs = len(names) * (len(names) - 1) // 2
    sizes, lengths = collections.Counter(len(set(labels)) for _, labels in entries), [len(text.split()) for text, _ in entries]
    lines += ["", "labels a sentence: " + ", ".join(f"{size}: {sizes[size]:,}" for size in sorted(sizes)) + f"; {len(together) // 2:,} of {pairs:,} pairs of labels occur together",
              f"words a sentence: mean {np.mean(lengths):.1f}, shortest {min(lengths)}, median {int(np.median(lengths))}, longest {max(lengths)}"]
    for n in (1, 2, 3):
        grams = [gram for text, _ in entries for words in [re.findall(r"\w+", text.casefold())] for gram in zip(*(words[k:] for k in range(n)))]
        lines.append(f"distinct {n}-grams: {len(set(grams)):,} of {len(grams):,} ({100 * len(set(grams)) / max(1, len(grams)):.1f} %)")
    lines += ["", f"ten at random (seed {seed}):"]
    for row in np.random.default_rng(seed).permutation(len(entries))[:10]:
        lines.append(f"    [{', '.join(entries[row][1])}] {entries[row][0]}")
    return "\n".join(lines)


# --- main ----------------------------------------------------------------------------------------------------------------

def parse(words=None):
    parser = argparse.ArgumentParser(description="Training sentences and label descriptions from a large language model, checked before they are kept.",
                                     epilog="exit codes: 0 done, 2 a mistake or a server that does not work, 130 interrupted; the same command goes on", allow_abbrev=False)
    parser.add_argument("job", choices=("sentences", "descriptions"))
    parser.add_argument("--labels", metavar="FILE", help="label file, one name a line")
    parser.add_argument("--dataset", choices=tuple(data.DATASET_NAMES), help="instead of --labels: a dataset's own names and synonyms")
    parser.add_argument("--synonyms", metavar="FILE", help='other words for labels that count as naming them, and under "" phrases that do not: JSON {"sofa": ["couch"], "": ["hot dog"]}')
    parser.add_argument("--out", metavar="FILE", help="default: texts.jsonl, descriptions.json")
    parser.add_argument("--count", type=int, default=8000, help="sentences wanted (default 8000); 0: make none, print the report")
    parser.add_argument("--seed", type=int, default=0, help="of label sets, grammar and requests (default 0)")
    parser.add_argument("--report", action="store_true", help="afterwards print what a person needs to judge the sentences")
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    server = parser.add_argument_group("language model")
    server.add_argument("--llm", default="template", metavar="URL", help="a server of the OpenAI-compatible protocol, such as http://localhost:8080/v1; default: template, a grammar that is no language model. "
                        "A key is read from the environment variable LLM_API_KEY")
    server.add_argument("--model", metavar="NAME", help="default: the only one that the server has")
    server.add_argument("--concurrency", type=int, default=4, help="requests at once (default 4)")
    server.add_argument("--timeout", type=float, default=120, help="seconds for an answer (default 120)")
    server.add_argument("--tries", type=int, default=6, help="of a request before giving up (default 6)")
    server.add_argument("--retry-wait", type=float, default=1.0, help="seconds before the second try, doubled at each (default 1)")
    server.add_argument("--request-options", metavar="JSON", help='added to every request; null takes a field out: {"max_tokens": null, "max_completion_tokens": 400}')
    choices = parser.add_argument_group("choices (L1 to L7 in the docstring)")
    choices.add_argument("--max-labels", type=int, default=5, help="L1 labels of a set, at most (default 5)")
    choices.add_argument("--co-occurrence", action="store_true", help="L3 ask the model first what is seen together")
    choices.add_argument("--per-request", type=int, default=5, help="L4 sentences a request (default 5)")
    choices.add_argument("--temperature", type=float, help="L5 (default 0.9 for sentences, 0.7 for descriptions)")
    choices.add_argument("--words", type=int, nargs=2, metavar=("MIN", "MAX"), help="L6 length (default 4 40; descriptions 6 40)")
    choices.add_argument("--language", choices=("English", "any"), default="English", help="L6 any: not checked")
    choices.add_argument("--patience", type=int, default=200, help="stop after this many requests in a row without a new sentence (default 200)")
    choices.add_argument("--instruction", metavar="TEXT", help="L9 how a request begins, instead of SENTENCE_INSTRUCTION or DESCRIPTION_INSTRUCTION")
    options = parser.parse_args(words)
    for name, low in (("count", 0), ("seed", 0), ("concurrency", 1), ("tries", 1), ("max_labels", 1), ("per_request", 1), ("patience", 1)):
        if getattr(options, name) < low:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {low}")
    if not 0 < options.timeout <= 86400 or not 0 <= options.retry_wait <= 3600:
        parser.error("--timeout must be above 0 and at most a day, --retry-wait at least 0 and at most an hour")
    if options.temperature is not None and not 0 <= options.temperature <= 5:
        parser.error(f"--temperature {options.temperature:g}: must lie in 0 to 5")
    if options.words and not 1 <= options.words[0] <= options.words[1]:
        parser.error(f"--words {options.words[0]} {options.words[1]}: the first must be at least 1 and not above the second")
    unused = (["model", "concurrency", "timeout", "tries", "retry_wait", "request_options", "temperature", "instruction"] if options.llm == "template" else []) + \
        (["count", "report", "max_labels", "per_request", "patience", "co_occurrence"] if options.job == "descriptions" else [])
    unused = [f"--{name.replace('_', '-')}" for name in unused if getattr(options, name) != parser.get_default(name)]
    if unused and not (options.job == "sentences" and options.co_occurrence):
        say(f"not used here: {', '.join(unused)}{' (no --llm was given)' if options.llm == 'template' else ''}")
    return options


def label_list(options):
    """--labels or --dataset, and the synonyms that go with them -> (names, {name: [words]})"""
    if options.labels and options.dataset:
        raise UsageError("--labels and --dataset exclude each other; give one")
    if not (options.labels or options.dataset):
        raise UsageError("give the labels: --labels FILE (one name a line), or --dataset NAME")
    names = data.read_labels(options.labels) if options.labels else list(data.DATASET_NAMES[options.dataset])
    synonyms = data.synonyms_of(names, options.dataset)
    if options.synonyms:
        table = data.read_json(options.synonyms, "synonyms")
        if not isinstance(table, dict) or not all(isinstance(v, list) and all(isinstance(x, str) and x.strip() for x in v) for v in table.values()):
            raise UsageError(f'synonyms {options.synonyms}: must be {{"label": ["other word", ...]}}')
        unknown = [name for name in table if name and name not in names]
        if unknown:
            raise UsageError(f"synonyms {options.synonyms}: {', '.join(unknown[:5])} {'is' if len(unknown) == 1 else 'are'} not in the label list")
        synonyms.update(table)
    return names, synonyms


def main(words=None):
    options = parse(words)
    out = Path(options.out or {"sentences": "texts.jsonl", "descriptions": "descriptions.json"}[options.job])
    if options.job == "sentences" and options.count == 0:
        print(report(out, options.seed))
        return
    if out.suffix == ".gz":
        raise UsageError(f"--out {out}: sentences are added line by line, which a .gz does not allow; pack it afterwards (--count 0 --report reads it)")
    names, synonyms = label_list(options)
    extra = {}
    if options.request_options:
        try:
            extra = json.loads(options.request_options)
        except ValueError as error:
            raise UsageError(f"--request-options: not valid JSON ({error})") from None
        if not isinstance(extra, dict) or {"model", "messages", "stream"} & set(extra):
            raise UsageError("--request-options: must be a JSON object, without model, messages and stream")
    server = None
    if options.llm != "template":
        server = Server(options.llm, options.model, options.timeout, options.tries, options.retry_wait, extra)
        say(f"{server.model} at {server.address}, prompt in {Path(__file__).name}")
    elif options.job == "descriptions" or options.co_occurrence:
        raise UsageError(f"{'descriptions' if options.job == 'descriptions' else '--co-occurrence'}: a grammar knows nothing of the things; give a language model, such as --llm http://localhost:8080/v1")
    else:
        say("--llm template: sentences of a fixed grammar, no language model")
    more = {name: getattr(options, name) for name in ("temperature", "words", "instruction") if getattr(options, name) is not None}
    if options.job == "descriptions":
        found = descriptions(names, synonyms, out, server, options.seed, language=options.language, concurrency=options.concurrency, overwrite=options.overwrite, quiet=options.quiet, **more)
        missing = [name for name in names if name not in found]
        if missing:
            say(f"no usable description of {', '.join(missing[:10])}{' ...' if len(missing) > 10 else ''}: the template stands alone there; the same command tries again")
        print(f"{out}: {len(names) - len(missing)} of {len(names)} labels described")
        return
    journal = sentences(names, synonyms, out, options.count, options.seed, server, max_labels=options.max_labels, per_request=options.per_request, language=options.language,
                        co_occurrence=options.co_occurrence, patience=options.patience, concurrency=options.concurrency, overwrite=options.overwrite, quiet=options.quiet, **more)
    if not journal.kept:
        why = collections.Counter(x["why"] for record in read_journal(journal.path)[1:] for x in record.get("rejected", []))
        raise UsageError(f"{out}: no sentence passed the checks (most often: {why.most_common(1)[0][0] if why else 'nothing was asked'}); {journal.path} says why, sentence by sentence")
    print(report(out, options.seed) if options.report else f"{out}: {out_count(out):,} sentences")


def run(words=None):
    """main, with a person's mistakes as one line and an exit code."""
    try:
        main(words)
        sys.stdout.flush()
        return 0
    except Declined as error:  # where no other request could pass
        say(f"{Path(__file__).name}: the server declines ({error})")
        return 2
    except UsageError as error:
        say(f"{Path(__file__).name}: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped; what was accepted is in the file, and the same command goes on")
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        say(f"{Path(__file__).name}: {error}")
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # labels of any script
    code = run()
    sys.stderr.flush()
    os._exit(code)  # requests still under way sit in threads that nobody waits for
