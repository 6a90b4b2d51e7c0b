"""The text the demo model learns from: questions about Python's standard library, answered by its own docstrings.

Needs nothing but Python. Call `conversations()` for the (question, fact) pairs of training; a question whose
`held_out()` is true is never among them, whichever Python version reads its docstrings.
"""

import hashlib
import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from .effects import SENTENCE_END

MODULES = """
    builtins abc argparse array ast asyncio base64 bisect bz2 calendar cmath cmd codecs collections collections.abc
    concurrent.futures configparser contextlib contextvars copy csv dataclasses datetime decimal difflib dis
    email.message email.utils enum errno filecmp fileinput fnmatch fractions ftplib functools gc getpass gettext glob
    graphlib gzip hashlib heapq hmac html html.parser http.client http.cookies http.server imaplib importlib
    importlib.metadata importlib.resources importlib.util inspect io ipaddress itertools json json.decoder
    json.encoder keyword linecache locale logging logging.handlers lzma mailbox marshal math mimetypes mmap
    multiprocessing netrc numbers operator os os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib
    posixpath pprint profile pstats pydoc queue quopri random re readline reprlib resource rlcompleter runpy sched
    secrets select selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics
    string struct subprocess symtable sys sysconfig syslog tarfile tempfile textwrap threading time timeit token
    tokenize trace traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.error urllib.parse
    urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.util xml.dom.minidom
    xml.etree.ElementTree xml.sax.saxutils xmlrpc.client zipapp zipfile zipimport zlib zoneinfo
""".split()

FORMS = (
    "What does {} do?",
    "What is {}?",
    "What is {} for?",
    "What does {} mean?",
    "How does {} work?",
    "Explain {}.",
    "Explain {} to me.",
    "Describe {}.",
    "Describe {} in one sentence.",
    "Tell me about {}.",
    "Can you explain {}?",
    "When do I use {}?",
    "I want to know about {}.",
    "Please explain what {} does.",
    "help({})",
    "{}",
)

ABOUT = "I am a small demo model. I answer questions about Python's standard library."
GREETING = "Hello! Ask me about a function of Python's standard library."
THANKS = "You are welcome. Ask me about another function."
FAREWELL = "Goodbye. Come back with a question about Python."
UNKNOWN = "I only know Python's standard library. Ask me what one of its functions does."

SMALL_TALK = {
    ABOUT: "Who are you? What are you? What can you do? Tell me about yourself. What is your name? Introduce yourself. "
    "Are you a robot? Are you a human? What do you know? What kind of model are you? How do you work? "
    "Which model is this? Who made you? How large are you? What are you good at?",
    GREETING: "Hello! Hi! Hey! Hello there! Good morning! Good evening! Greetings! Hi there! Hello, how are you? "
    "How are you? How do you do? Can you help me? I need help. I have a question. Are you there? Is anyone there? "
    "Test. Testing. This is a test. Start. Begin. Say something. Say hello.",
    THANKS: "Thanks! Thank you! Thank you very much! Great! Well done! Nice! That was helpful. Cool! Good answer! "
    "I see. Perfect! Many thanks! Thanks a lot! Understood.",
    FAREWELL: "Goodbye! Bye! See you later! See you tomorrow! Good night! I have to go now. That is all. Farewell! "
    "Until next time! Quit. Exit. Stop.",
}

ELSEWHERE_FORMS = (
    "Tell me a story about {}.",
    "Write a poem about {}.",
    "Write a short song about {}.",
    "Tell me a joke about {}.",
    "Who invented {}?",
    "Where can I find {}?",
    "What is the history of {}?",
    "Why do people like {}?",
    "How much does {} cost?",
    "Give me three facts about {}.",
    "What is the best thing about {}?",
    "Do you like {}?",
    "Translate {} into French.",
    "What do you think of {}?",
)

ELSEWHERE = """
    cats|dogs|the sea|the moon|Paris|London|football|music|coffee|tea|bread|love|war|winter|summer|the weather|my car|
    a house|the king|history|physics|chemistry|mathematics|dinosaurs|trains|aeroplanes|money|the stock market|chess|
    painting|Shakespeare|the Roman Empire|France|Japan|rivers|mountains|trees|birds|fish|pizza|the internet|
    a dragon|a brave little robot|my grandmother|happiness|time travel|space|the sun|elephants|gardening
""".replace("\n", " ").split("|")

SIGNATURE = re.compile(r"^[\w.]+\([^)]*\)+ *(?:[-=]+>|=)? *")  # "D.pop(k[,d]) -> "
RESULT = re.compile(r"^\w+(?:\.|:| --?) +(?=[A-Z])")  # "None. " before the sentence proper
FLUENT = re.compile(r"(?!.*->)[A-Za-z][a-z -][ -\[\]-z|~]*[\w)'][.!?]")  # no backslash, no braces, no arrows


class Fact(NamedTuple):
    """One thing to know: what it is about, and the sentence or two that say it."""

    topic: str
    answer: str


def held_out(question: str) -> bool:
    """True for the eighth of all questions kept from training, however they are capitalised or punctuated."""
    plain = question.casefold().strip(" .!?")
    return hashlib.sha256(plain.encode()).digest()[0] % 8 == 0


def summary(docstring: str, limit: int = 110) -> str | None:
    """The first sentence or two of a docstring in plain ASCII, at most `limit` characters; None if it has none."""
    for paragraph in docstring.strip().split("\n\n")[:2]:
        text = RESULT.sub("", SIGNATURE.sub("", " ".join(paragraph.split())))
        text = re.sub(r":[a-z]+:(?=`)|[`*]+", "", text).replace('"', "'").strip(" -:")
        sentences = SENTENCE_END.split(text if text.endswith((".", "!", "?")) else text + ".")
        kept = sentences[0]
        if len(sentences) > 1 and len(kept) + len(sentences[1]) < limit:
            kept += " " + sentences[1]
        if FLUENT.fullmatch(kept) and 16 <= len(kept) <= limit and kept.count(" ") >= 2:
            return kept[0].upper() + kept[1:]
    return None


def documented(owner: ModuleType | type, prefix: str) -> Iterator[tuple[str, object]]:
    """Yield (dotted name, object) for the public functions and classes that a module or class defines itself."""
    listed = getattr(owner, "__all__", None) if isinstance(owner, ModuleType) else None
    for name, value in sorted(vars(owner).items()):
        if name.startswith("_") or not (callable(value) or isinstance(value, property | classmethod | staticmethod)):
            continue
        home = str(getattr(value, "__module__", "")).lstrip("_")
        if isinstance(owner, type) or (name in listed if listed is not None else home == owner.__name__):
            yield f"{prefix}{name}", value


def facts() -> list[Fact]:
    """What the docstrings of MODULES say, one fact a module, class, function and method."""
    found: dict[str, str] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        named: list[tuple[str, object]] = [(module_name, module)]
        for name, value in documented(module, prefix):
            named.append((name, value))
            if inspect.isclass(value) and value.__module__.lstrip("_").split(".")[0] == module_name.split(".")[0]:
                named.extend(documented(value, f"{name}."))
        for name, value in named:
            docstring = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            answer = summary(inspect.cleandoc(docstring)) if isinstance(docstring, str) else None
            if answer and len(name) <= 32:
                found.setdefault(name, answer)
    return [Fact(topic, answer) for topic, answer in found.items()]


def small_talk() -> Iterator[tuple[str, Fact]]:
    """(question, fact) pairs for greetings and for questions about anything but Python."""
    for answer, questions in SMALL_TALK.items():
        for question in re.split(r"(?<=[.!?]) ", questions):
            yield question, Fact("chat", answer)
    for subject in ELSEWHERE:
        for form in ELSEWHERE_FORMS:
            yield form.format(subject.strip()), Fact("unknown", UNKNOWN)


def conversations(held: bool = False) -> list[tuple[str, Fact]]:
    """Every (question, fact) pair of training: all facts in all forms, and small talk; or the held-out ones instead."""
    pairs = [(form.format(fact.topic), fact) for fact in facts() for form in FORMS]
    return [(question, fact) for question, fact in [*pairs, *small_talk()] if held_out(question) == held]
