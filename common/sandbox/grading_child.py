"""What runs in the two boxes of a grading (`common/sandbox/grading.py`): the solution in one, its tests in the other.

Each box can call functions of the other; the parent carries the messages and does not read them. Between the boxes pass

    by value      None, bool, int, float, complex, str, bytes, bytearray, list, tuple (named ones as plain ones), set,
                  frozenset, dict, range, Counter, OrderedDict, defaultdict, deque, Decimal, Fraction, date, time,
                  datetime, timedelta, timezone, built-in types; what a function changes in the lists, sets
                  and dicts that it was given is changed for the caller too
    by reference  functions, which can be called, and iterators, which can be iterated
    as a token    every other object: it can be handed back and has a truth value, and equals nothing but itself

so that a comparison in a test is one of the tests' box with plain data. (A test that hands the solution `eval` or the
like hands it the tests' box as well.) Exceptions arrive as their nearest built-in
class. The format is made for a short start, since importing `json` takes as long as starting Python: a line for each
value, made of its kind and its text or the number of values inside, which follow.
"""

import builtins
import sys
from collections.abc import Callable, Iterator

SCALARS = {  # kind: (type, to text, from text); the types' own methods, so that subclasses pass as their base
    "int": (int, lambda value: int.__format__(value, "x"), lambda text: int(text, 16)),
    "float": (float, float.hex, float.fromhex),
    "str": (
        str,
        lambda value: str.encode(value, "unicode_escape").decode("ascii"),
        lambda text: text.encode("ascii").decode("unicode_escape"),
    ),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
}
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
CONSTANTS = {"None": None, "True": True, "False": False}
CLASSES = {  # what rebuilds a value: arguments of its class
    "builtins.complex": lambda value: (value.real, value.imag),
    "builtins.bytearray": lambda value: (bytes(value),),
    "builtins.range": lambda value: (value.start, value.stop, value.step),
    "collections.Counter": lambda value: (dict(value),),
    "collections.OrderedDict": lambda value: (dict(value),),
    "collections.defaultdict": lambda value: (None, dict(value)),
    "collections.deque": lambda value: (list(value), value.maxlen),
    "decimal.Decimal": lambda value: (str(value),),
    "fractions.Fraction": lambda value: (value.numerator, value.denominator),
    "datetime.date": lambda value: (value.year, value.month, value.day),
    "datetime.time": lambda value: (value.hour, value.minute, value.second, value.microsecond, value.tzinfo),
    "datetime.datetime": lambda value: (*value.timetuple()[:6], value.microsecond, value.tzinfo),
    "datetime.timezone": lambda value: (value.utcoffset(None),),
    "datetime.timedelta": lambda value: (value.days, value.seconds, value.microseconds),
}


ENDS_OF_ITERATION = (StopIteration, StopAsyncIteration)


class NotPlainData(BaseException):
    """A test looks into an object that stays in the solution's box. No `hasattr` or `except` of a test takes it in."""


class Token:
    """An object of the other box."""

    def __init__(self, peer: "Peer", key: object, name: str, truth: bool) -> None:
        self._peer, self._key, self._name, self._truth = peer, key, name, truth

    def __bool__(self) -> bool:
        return self._truth

    def __repr__(self) -> str:
        return f"<{self._name} of the other box>"

    def __getattr__(self, attribute: str) -> None:
        if attribute.startswith("__"):  # Python itself asks, e.g. whether it can be copied
            raise AttributeError(attribute)
        raise NotPlainData(f"no .{attribute}: objects of class {self._name} are not plain data and stay in their box")


class Function(Token):
    def __call__(self, *args: object, **kwargs: object) -> object:
        value, changed = self._peer.ask("call", self._key, args, kwargs)
        if changed is not None:
            update(args, changed[0])
            update(tuple(kwargs.values()), tuple(changed[1].values()))
        return value


class Stream(Token):
    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> object:
        value, ended = self._peer.ask("next", self._key)
        if ended:
            raise StopIteration
        return value


REFERENCES = {"token": Token, "function": Function, "stream": Stream}


def update(old: object, new: object) -> None:
    """Give the changeable values in the tuple `old` the contents that their counterparts in `new` have."""
    if isinstance(old, Token):
        return
    if isinstance(old, tuple):
        for one, other in zip(old, new, strict=True):
            update(one, other)
    elif isinstance(old, dict):
        old.clear()
        dict.update(old, new)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, list | bytearray) or hasattr(old, "maxlen"):  # the last: a deque
        old.clear()
        old.extend(new)


class Peer:
    """This end of the wire between the boxes.

    Args:
        send, receive: carry one message.
        exports: objects that the other box may use, by name; those it is handed on the way are added by number.
    """

    def __init__(self, send: Callable[[bytes], None], receive: Callable[[], bytes], exports: dict) -> None:
        self.send, self.receive, self.exports = send, receive, exports
        self.calls = 0

    def ask(self, *request: object) -> tuple[object, object]:
        """Have the other box call a function or advance an iterator, and meanwhile serve what it asks in return.

        Returns:
            (what a function returned, its arguments where it changed them), or (the next item, whether there is none).
        """
        self.calls += 1
        self.send(self.dump(request))
        while True:
            kind, *answer = self.load(self.receive())
            if kind == "raised":
                raise rebuilt_exception(*answer)
            if kind == "returned":
                return tuple(answer)
            self.serve(kind, *answer)

    def serve(self, kind: str, key: object, args: tuple = (), kwargs: dict | None = None) -> None:
        """Do what the other box asks: `key` is the name or number of an export."""
        try:
            target = self.exports[key]
            if kind == "next":
                try:
                    item, ended = next(target), False
                except StopIteration:
                    item, ended = None, True
                answer = self.dump(("returned", item, ended))
            else:
                before = self.dump((args, kwargs))
                value = target(*args, **kwargs)
                changed = self.dump((args, kwargs)) != before
                answer = self.dump(("returned", value, (args, kwargs) if changed else None))
        except BaseException as error:  # SystemExit included: it must not look like an end of the tests
            answer = self.dump(("raised", *described_exception(error)))
        self.send(answer)

    def dump(self, value: object) -> bytes:
        lines: list[str] = []
        self._write(value, lines.append)
        return "\n".join(lines).encode("ascii")

    def load(self, message: bytes) -> object:
        return self._read(iter(message.decode("ascii").split("\n")))

    def _write(self, value: object, line: Callable[[str], None]) -> None:
        if value is None or value is True or value is False:
            return line(f"constant {value}")
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if name in CLASSES:
            line(f"object {name}")
            return self._write(CLASSES[name](value), line)
        for kind, (base, text, _) in SCALARS.items():
            if isinstance(value, base):
                return line(f"{kind} {text(value)}")
        for kind, base in CONTAINERS.items():
            if isinstance(value, base):
                items = list(base.__iter__(value))
                line(f"{kind} {len(items)}")
                return [self._write(item, line) for item in items]
        if isinstance(value, dict):
            items = list(dict.items(value))
            line(f"dict {len(items)}")
            return [self._write(part, line) for item in items for part in item]
        if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
            return line(f"type {value.__name__}")
        if isinstance(value, Token):
            line("yours")
            return self._write(value._key, line)
        key = len(self.exports)
        self.exports[key] = value
        kind = "function" if callable(value) else "stream" if hasattr(type(value), "__next__") else "token"
        line(kind)
        return self._write((key, type(value).__name__, bool(value)), line)

    def _read(self, lines: Iterator[str]) -> object:
        kind, _, text = next(lines).partition(" ")
        if kind == "constant":
            return CONSTANTS[text]
        if kind in SCALARS:
            return SCALARS[kind][2](text)
        if kind in CONTAINERS:
            return CONTAINERS[kind]([self._read(lines) for _ in range(int(text))])
        if kind == "dict":
            return {self._read(lines): self._read(lines) for _ in range(int(text))}
        if kind == "object" and text in CLASSES:
            module, _, name = text.rpartition(".")
            return getattr(__import__(module), name)(*self._read(lines))
        if kind == "type" and isinstance(vars(builtins)[text], type):
            return vars(builtins)[text]
        if kind == "yours":
            return self.exports[self._read(lines)]
        return REFERENCES[kind](self, *self._read(lines))


def described_exception(error: BaseException) -> tuple[list[str], str]:
    """The names of its class and its bases, and its message."""
    try:
        text = str(error)[:1000]
    except BaseException:
        text = ""
    return [base.__name__ for base in type(error).__mro__], text


def rebuilt_exception(names: list[str], text: str) -> Exception:
    """The nearest built-in exception, marked with the name that the solution's own had.

    Those by which Python itself tells the end of an iteration are none of these: they would end a loop of the tests
    without a word, as `all(map(...))` is one.
    """
    for name in [*names, "Exception"]:
        base = vars(builtins).get(name)
        if isinstance(base, type) and issubclass(base, Exception) and not issubclass(base, ENDS_OF_ITERATION):
            try:
                error = base(text)
            except TypeError:  # UnicodeDecodeError wants more
                continue
            error.of_solution = names[0]
            return error
    raise AssertionError("Exception takes one argument")


def run_solution(source: str, send: Callable[[bytes], None], receive: Callable[[], bytes]) -> None:
    """Load the solution, report the names that it defines or how it failed, and serve calls for ever."""
    module = type(sys)("solution")
    sys.modules["solution"] = module  # dataclasses look their module up
    peer = Peer(send, receive, {})
    failure = None
    try:
        code = compile(source, "<solution>", "exec")
    except BaseException as error:  # also a MemoryError or RecursionError of the parser
        failure = ("syntax", str(error))
    else:
        try:
            exec(code, vars(module))
        except BaseException as error:
            names, text = described_exception(error)
            failure = ("import" if "ImportError" in names else error_name(names[0]), f"at the top level: {text}")
    if failure is None:
        peer.exports.update((name, value) for name, value in vars(module).items() if callable(value))
    send(peer.dump((failure, list(peer.exports))))
    while True:
        peer.serve(*peer.load(receive()))


def run_tests(
    asserts: list[str], setup: str, entry_point: str | None, send: Callable[[bytes], None], receive: Callable
) -> None:
    """Run the tests against the solution in the other box, and report whether they passed, the error and its detail.

    That they passed follows from what happened here alone. The other box can say no more than that it failed.
    """
    peer = Peer(send, receive, {})
    passed = False
    try:
        failure, names = peer.load(receive())
        if failure is None:
            error, detail = outcome(peer, names, asserts, setup, entry_point)
            passed = not error
        else:
            error, detail = failure
            if error not in ("syntax", "import", "memory") and not error.startswith("exception:"):
                raise ValueError(error)
    except BaseException as fault:
        error, detail = "killed", f"its answer cannot be read: {type(fault).__name__}"
    words = [" ".join(str(text).split())[:300] for text in (error, detail)]
    send("\n".join(["verdict", "passed" if passed else "failed", *words]).encode("ascii", "backslashreplace"))


def outcome(peer: Peer, names: list[str], asserts: list[str], setup: str, entry_point: str | None) -> tuple[str, str]:
    """Error and detail of the tests; both empty when they passed."""
    if entry_point is not None and entry_point not in names:
        return "no function", f"it does not define {entry_point}"
    functions = {name: Function(peer, name, name, True) for name in names}
    sources = {f"<test {i}>": text for i, text in enumerate([setup, *asserts])}
    try:
        codes = [compile(text, name, "exec") for name, text in sources.items()]
    except BaseException as fault:
        return "tests", f"{type(fault).__name__}: {fault}"
    # Behind Python's own names and those of the setup: a solution that defines `set` or `abs` must not get to compare
    namespace = {"__name__": "tests", "__builtins__": {**modules_used(codes), **functions, **vars(builtins)}}
    if entry_point is not None:
        namespace[entry_point] = namespace["candidate"] = functions[entry_point]
    for code in codes:
        try:
            exec(code, namespace)
        except BaseException as fault:
            return error_of(fault, in_setup=code is codes[0]), detail_of(fault, sources)
    return ("", "") if peer.calls else ("no function", "the tests call nothing that it defines")


def modules_used(codes: list) -> dict[str, object]:
    """Standard modules whose names occur in `codes`: some tests leave the import to the solution."""
    modules = {}
    for name in {name for code in codes for name in code.co_names} & sys.stdlib_module_names:
        try:
            modules[name] = __import__(name)
        except Exception:  # not installed, e.g. tkinter
            continue
    return modules


def error_of(fault: BaseException, in_setup: bool) -> str:
    """The word for an exception that ended the tests (see `grading.Verdict`)."""
    name = getattr(fault, "of_solution", None)
    if name is None and in_setup:
        return "tests"
    if name is None and isinstance(fault, NotPlainData):
        return "not data"
    if name is None and type(fault) in (AssertionError, NameError):
        return "assertion" if type(fault) is AssertionError else "no function"
    return error_name(name or type(fault).__name__)


def error_name(exception: str) -> str:
    return "memory" if exception == "MemoryError" else f"exception:{exception}"


def detail_of(fault: BaseException, sources: dict[str, str]) -> str:
    """The line of the tests that failed, and the exception's message."""
    line, trace = "", fault.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name in sources:
            line = sources[name].splitlines()[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    text = described_exception(fault)[1]
    return f"{line}: {text}" if line and text else line or text
