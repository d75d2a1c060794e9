"""How cost grows: time and memory against rows, labels, label length, document length, adapters and clients.

    python bench/growth.py --model_dir runs/creditmix_sft --data data/creditmix_val.jsonl --outdir docs/growth
    python bench/growth.py --model_dir runs/creditmix_sft --data data/creditmix_val.jsonl --outdir runs/growth --quick

What the design leads to expect of every curve is written down (EXPECTED); from how many clients on the latency is a
line, and that the first adapter brings costs of its own, was seen in a first run and written there then. Points take
turns, and a round is one turn of each. Time is the wall clock's; memory is the tensors that a call has at its peak
beyond the model (by the allocator's log, or the card's count), and what the server and its children hold, mapped files
left out. Labels and adapters are made up: random words, random LoRA weights on the model's base. Writes a PNG for each
curve, and a JSON of its points, from which --kept draws it anew; prints the slopes as a Markdown table with what
disagrees by more than 15 %; the last line is JSON. Exit code 1: a wrong answer.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from harness import growth_curves
from harness.growth_curves import Curve, Expected, Series
from harness.interleave import every_round
from harness.memory import held_bytes, own_bytes, peak_beyond
from harness.serving import running_server

from bench.serve_load import Load, read_texts
from common import cli
from common.files import write_json
from common.models import adapters
from common.models import loading as models
from common.models.batching import MAX_BATCH_TOKENS
from common.models.source import LoadedModel, ModelSource

ROWS = (16, 64, 256, 512, 1024, 2048, 4096)
LABELS = (2, 4, 8, 16, 32, 64)
LABEL_TOKENS = (2, 4, 8, 16, 32, 64)
DOCUMENT_TOKENS = (64, 128, 256, 512, 1024, 1600)
ADAPTERS = (1, 2, 4, 8, 16, 32)
CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128)
FULL = 256  # rows that are more than a batch
BUDGET, RANKED = 2048, 96  # tokens of a batch where labels are what varies, and rows, which are more than a batch there
BUSY = 8  # clients that keep the model busy
LEAST = 0.2  # seconds that a time is taken over
ASKED = 64  # rows that the server is asked about
WARM = 8  # requests to each adapter before it is timed
SCHEMA = {  # its answer is as long for every document
    "type": "object",
    "properties": {"currency": {"enum": ["EUR", "USD"]}},
    "required": ["currency"],
    "additionalProperties": False,
}
NEW_TOKENS = 48

EXPECTED = {
    "rows": {
        "time": Expected("linear", "a constant cost a row, after the shared prefix"),
        "tensors": Expected("constant", "the token budget bounds a batch, once one is full", since=FULL),
    },
    "labels": {
        "time": Expected("linear", "each distinct label token is a column more in every row"),
        "tensors": Expected("sublinear", "rows x columns stay in the budget; only the head's share of it grows"),
    },
    "stem": {
        "time": Expected("constant", "labels that differ in their last token alone share their columns"),
        "tensors": Expected("constant", "the same columns"),
    },
    "label_tokens": {
        "time": Expected("linear", "a column for each further token of a spelling"),
        "tensors": Expected("sublinear", "rows x columns stay in the budget; only the head's share of it grows"),
    },
    "document": {
        "time": Expected("quadratic", "one pass over the prompt, whose attention is square; as many steps for each"),
        "tensors": Expected("linear", "activations and the key/value cache; no attention matrix is kept"),
    },
    "adapters": {
        "time": Expected("constant", "one is active at a time; a switch sets a name in each layer"),
        "tensors": Expected("linear", "its file's size each"),
        "held": Expected("linear", "its file's size each"),
    },
    "clients": {
        "time": Expected(
            "linear", "once the model is busy, one waits for the rows of all who are in front", since=BUSY
        ),
        "speed": Expected("saturating", "batches fill up until the model is busy"),
        "held": Expected("constant", "the queue and the budget are bounded"),
    },
}
TIME, TENSORS = "time of a call", "tensors at the peak"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/growth.py")
    parser.add_argument("--model_dir", help="a run folder, a model folder or a Hub id")
    parser.add_argument("--data", help='JSONL rows with their features under "features" or "question"')
    parser.add_argument("--outdir", type=cli.folder, required=True, help="folder of the plots")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(EXPECTED), default=list(EXPECTED), help="curves; default: all"
    )
    parser.add_argument("--rounds", type=cli.positive_int, default=5)
    parser.add_argument("--seconds", type=cli.positive_int, default=2, help="of load on the server, a point and round")
    parser.add_argument(
        "--kept", action="store_true", help="measure nothing: draw and judge anew what lies in --outdir as JSON"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two rounds, a quarter of the seconds, without the largest points"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    if args.kept:
        names = [name for name in args.only if Path(args.outdir, f"{name}.json").is_file()]
        if not names:
            raise cli.UserError(f"--kept: {args.outdir} has no curve, such as rows.json; measure without --kept")
        show([growth_curves.kept_curve(Path(args.outdir, f"{name}.json")) for name in names], Path(args.outdir))
        return cli.DONE
    if not (args.model_dir and args.data):
        raise cli.UserError("give --model_dir and --data to measure, or --kept to draw what has been measured")
    if args.quick:
        args.rounds, args.seconds = 2, args.seconds / 4
    texts = read_texts(args.data)
    if not texts:
        raise cli.UserError(f"{args.data} has no rows")
    random.Random(0).shuffle(texts)
    outdir = Path(args.outdir)
    outdir.mkdir(parents=True, exist_ok=True)

    models.quiet_libraries()
    started = time.perf_counter()
    curves, counts = measure(args, texts)
    for curve in curves:
        write_json(outdir / f"{curve.name}.json", curve.kept())
    show(curves, outdir)
    print(f"\n{counts['answers']:,} answers of the server, {counts['wrong']} wrong, {counts['errors']} errors")
    machine = {
        "device": models.describe_device(),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg()[0],
    }
    result = {
        "bench": "growth",
        "settings": vars(args),
        "machine": machine,
        "seconds": round(time.perf_counter() - started, 1),
        "curves": [curve.result() for curve in curves],
        "counts": counts,
    }
    print(json.dumps(result))
    return cli.FAILED if counts["wrong"] or counts["errors"] else cli.DONE


def show(curves: Sequence[Curve], outdir: Path) -> None:
    """Draw each curve, and print the table of their slopes."""
    for curve in curves:
        (outdir / f"{curve.name}.png").write_bytes(growth_curves.draw(curve))
    print(growth_curves.markdown(curves))


def measure(args: argparse.Namespace, texts: Sequence[str]) -> tuple[list[Curve], dict[str, int]]:
    """The curves that are asked for, and what the server's answers were."""
    curves = []
    inside = [name for name in args.only if name not in ("adapters", "clients")]
    if inside:
        scene = Scene(args, texts, *models.load_for_inference(ModelSource(args.model_dir)))
        curves += [{"document": document_curve}.get(name, label_curve)(scene, name) for name in inside]
        del scene
        give_back()
    counts = {"answers": 0, "wrong": 0, "errors": 0}
    if "adapters" in args.only or "clients" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            served = Served(args, texts[:ASKED], folder, counts)
            curves += [{"adapters": adapters_curve, "clients": clients_curve}[name](served) for name in args.only
                       if name not in inside]  # fmt: skip
    return curves, counts


# In this process


@dataclass
class Scene:
    args: argparse.Namespace
    texts: Sequence[str]
    model: Any
    tokenizer: Any

    def points(self, every: Sequence[int]) -> Sequence[int]:
        return every[:-1] if self.args.quick else every

    def rows(self, count: int) -> list[str]:
        """So many, the file's again and again where it has fewer."""
        return list(islice(cycle(self.texts), count))


def seconds_of(work: Callable[[], Any]) -> float:
    """Of one call, over as many as fill LEAST."""
    count, started = 0, time.perf_counter()
    while not count or time.perf_counter() - started < LEAST:
        work()
        count += 1
    return (time.perf_counter() - started) / count


def label_curve(scene: Scene, name: str) -> Curve:
    """Rows against a task's own labels, or a few rows against more, related or longer ones."""
    from common.tasks.ranking.creditmix import CREDITMIX
    from common.tasks.ranking.task import LabelTask
    from common.tasks.ranking.torch_ranker import TorchRanker

    def made_up(labels: Sequence[str]) -> LabelTask:
        return replace(CREDITMIX, labels=tuple(labels), instruction="Which label fits?")

    def ranking(task: LabelTask, rows: int, **budget: int) -> tuple[TorchRanker, Callable[[], Any]]:
        ranker, texts = TorchRanker(scene.model, scene.tokenizer, task, **budget), scene.rows(rows)
        return ranker, lambda: ranker.raw_scores(texts)

    against, one, every = {
        "rows": ("rows scored", "a row", ROWS),
        "labels": (f"labels, made-up words ({RANKED} rows)", "a label", LABELS),
        "stem": (f"labels of one stem ({RANKED} rows)", "a label", LABELS),
        "label_tokens": (f"tokens of a label's spelling ({RANKED} rows, 3 labels)", "a token", LABEL_TOKENS),
    }[name]
    work, columns = {}, []
    words = list(islice(made_up_words(), max(LABELS)))
    related = list(islice(of_one_stem(scene.tokenizer), max(LABELS)))
    for point in scene.points(every):
        x = float(point)
        if name == "rows":
            ranker, run = ranking(CREDITMIX, point)
        elif name == "labels":
            ranker, run = ranking(made_up(words[:point]), RANKED, max_batch_tokens=BUDGET)
        elif name == "stem":
            ranker, run = ranking(made_up(related[:point]), RANKED, max_batch_tokens=BUDGET)
        else:
            ranker, run = ranking(made_up(digits(point)), RANKED, max_batch_tokens=BUDGET)
            lengths = [len(form) for words in ranker.tree.forms for word in words for form in word]
            x = sum(lengths) / len(lengths)
        work[x] = run
        columns.append(ranker.tree.columns)
    return curve_of(scene, name, against, one, work, {"columns": columns})


def made_up_words() -> Iterator[str]:
    """Distinct words of three syllables."""
    rng, seen = random.Random(0), set()
    while True:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if word not in seen:
            seen.add(word)
            yield word


def of_one_stem(tokenizer: Any) -> Iterator[str]:
    """Labels that are the same tokens but for the last one."""
    stems = {form: tokenizer.encode(form, add_special_tokens=False) for form in ("Class", " Class")}
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token])
        if word[:1] == " " and word[1:].isalpha() and all(
            tokenizer.encode(form + word, add_special_tokens=False) == [*stem, token] for form, stem in stems.items()
        ):  # fmt: skip
            yield "Class" + word


def digits(count: int) -> list[str]:
    """Three labels of so many digits, which most tokenizers read one by one; they differ from the first one on."""
    rng = random.Random(count)
    return [first + "".join(rng.choices("0123456789", k=count - 1)) for first in "123"]


def document_curve(scene: Scene, name: str) -> Curve:
    """One document after the other through constrained extraction."""
    from common.generation import json_schema
    from common.models.batching import MAX_BATCH_TOKENS
    from common.models.source import LoadedModel
    from common.tasks.idp.extractor import ExtractionSettings, Extractor

    loaded = LoadedModel(scene.model, scene.tokenizer, MAX_BATCH_TOKENS)
    settings = ExtractionSettings(NEW_TOKENS, long="refuse")
    extractor = Extractor(loaded, SCHEMA, json_schema.preflight(SCHEMA), settings)

    def prompt_tokens(document: str) -> int:
        return len(extractor.encode(document))

    bare = prompt_tokens("")
    text = "\n".join(scene.rows(max(DOCUMENT_TOKENS) // 8))
    ids = scene.tokenizer.encode(text, add_special_tokens=False)
    work, written = {}, []
    for point in scene.points(DOCUMENT_TOKENS):
        document = scene.tokenizer.decode(ids[:point])
        if prompt_tokens(document) > extractor.room:
            cli.log(f"{point} tokens of a document left out: they do not fit the model's context")
            continue
        run = functools.partial(extractor.extract, [document])
        written.append(run()[0].tokens)
        work[float(prompt_tokens(document) - bare)] = run
    facts = {"prompt_tokens_without_document": bare, "tokens_written": written}
    return curve_of(scene, name, "tokens of the document", "a token", work, facts)


def curve_of(
    scene: Scene, name: str, against: str, one: str, work: Mapping[float, Callable[[], Any]], facts: Mapping[str, Any]
) -> Curve:
    """Memory, which is the same every time, and then time, round by round."""
    peaks = {}
    for x, run in work.items():
        peaks[x] = [peak_beyond(run)]
        cli.log(f"{name} {x:g}: {growth_curves.amount(peaks[x][0], 'bytes')}")
    turns = {x: functools.partial(seconds_of, run) for x, run in work.items()}
    seconds = every_round(turns, scene.args.rounds, lambda value: growth_curves.amount(value, "s"))
    expected = EXPECTED[name]
    series = [Series(TIME, "s", seconds, expected["time"]), Series(TENSORS, "bytes", peaks, expected["tensors"])]
    return Curve(name, against, one, series, facts)


# On the server


def give_back() -> None:
    """What this process no longer needs of the card, which the server is going to."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


@dataclass
class Served:
    """Made-up adapters in a folder, what each answers to each text, and the tensors that they take in memory."""

    args: argparse.Namespace
    texts: Sequence[str]
    folder: str
    counts: dict[str, int]
    names: list[str] = field(default_factory=list)
    expected: list[list[dict]] = field(default_factory=list)
    held: dict[float, list[float]] = field(default_factory=dict)
    file_bytes: int = 0

    def __post_init__(self) -> None:
        from common.models import tokenizers
        from common.tasks.ranking import creditmix
        from common.tasks.ranking.classifier import Classifier
        from common.tasks.ranking.creditmix import CREDITMIX

        self.adapters = ADAPTERS[:-1] if self.args.quick else ADAPTERS
        most = 1 + max(self.adapters) if "adapters" in self.args.only else 1
        base = (
            adapters.base_of(self.args.model_dir) if adapters.is_adapter(self.args.model_dir) else self.args.model_dir
        )
        tokenizer = tokenizers.load_tokenizer(adapters.tokenizer_folder(self.args.model_dir, base))
        self.names = [f"growth_{number:02}" for number in range(most)]
        make_adapters([Path(self.folder) / name for name in self.names], base, tokenizer)
        self.file_bytes = (Path(self.folder) / self.names[0] / adapters.ADAPTER_WEIGHTS).stat().st_size

        cleaned = [creditmix.clean_features(text) for text in self.texts]
        model = models.load_base(ModelSource(base)).eval()
        models.align_model(model, tokenizer)
        for further, name in enumerate(self.names):
            path = str(Path(self.folder) / name)
            model = adapters.load_adapter(model, path, name=name).eval()
            model.set_adapter(name)
            classifier = Classifier.on(LoadedModel(model, tokenizer, MAX_BATCH_TOKENS), path, CREDITMIX)
            self.expected.append(classifier.answers(cleaned, classifier.calibration(None)))
            if not further:
                first = held_bytes(model)
            elif further in self.adapters:
                self.held[float(further)] = [held_bytes(model) - first]
        del model, classifier
        give_back()

    def start(self):
        return running_server(self.folder)

    def load(self, running: Any, adapters: int, clients: int, seconds: float) -> tuple[float, float]:
        """(answers a second, median seconds of an answer) of so many clients over the first so many adapters."""
        load = Load(running, self.names[:adapters], self.texts, self.expected[:adapters])
        speed = load.run(clients, seconds)
        self.counts["answers"] += load.answers
        self.counts["wrong"] += load.wrong
        self.counts["errors"] += load.failed
        return speed, statistics.median(load.seconds[clients])


def make_adapters(folders: Sequence[Path], base: str, tokenizer: Any) -> None:
    """Runs of the recipe's LoRA shape with random weights, as a trainer leaves them."""
    import torch

    model = models.load_base(ModelSource(base))
    fingerprint = adapters.fingerprint(model)
    adapted = adapters.add_lora(model, r=16, alpha=32, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    for folder in folders:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.1
        adapted.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)
        record = {"method": "sft", "started": "2026-01-01T00:00:00Z", "base_fingerprint": fingerprint}
        (folder / "run.json").write_text(json.dumps(record))


def adapters_curve(served: Served) -> Curve:
    """A server a round, which is asked for more and more adapters beside a first one, at random by one client."""
    seconds: dict[float, list[float]] = {float(count): [] for count in served.adapters}
    held: dict[float, list[float]] = {float(count): [] for count in served.adapters}
    rounds = min(served.args.rounds, 3)
    for turn in range(rounds):
        with served.start() as running:
            for name in ("base", served.names[0]):
                for text in served.texts:
                    running.post(name, text)
            served.load(running, 1, 1, served.args.seconds)
            asked = 1
            for count in served.adapters:
                for name in served.names[asked : count + 1]:
                    for text in served.texts[:WARM]:
                        running.post(name, text)
                asked = count + 1
                _, latency = served.load(running, asked, 1, served.args.seconds)
                seconds[count].append(latency)
                held[count].append(own_bytes(running.process.pid))
                cli.log(
                    f"round {turn + 1} of {rounds}: {count} adapters {growth_curves.amount(latency, 's')}, "
                    f"{growth_curves.amount(held[count][-1], 'bytes')}"
                )
    expected = EXPECTED["adapters"]
    file_each = {name: replace(expected[name], marginal=served.file_bytes) for name in ("tensors", "held")}
    series = [
        Series("answer to one client (p50)", "s", seconds, expected["time"]),
        Series("tensors of the adapters", "bytes", served.held, file_each["tensors"]),
        Series("memory of the server", "bytes", held, file_each["held"]),
    ]
    return Curve("adapters", "further adapters on one base", "an adapter", series, {"file_bytes": served.file_bytes})


def clients_curve(served: Served) -> Curve:
    """More and more clients of one adapter, each of which asks again as soon as it is answered."""
    clients = CLIENTS[:-1] if served.args.quick else CLIENTS
    speeds: dict[float, list[float]] = {float(count): [] for count in clients}
    held: dict[float, list[float]] = {float(count): [] for count in clients}
    with served.start() as running:

        def turn(count: int) -> float:
            speed, latency = served.load(running, 1, count, served.args.seconds)
            speeds[count].append(speed)
            held[count].append(own_bytes(running.process.pid))
            return latency

        served.load(running, 1, max(clients), served.args.seconds)  # warms up
        turns = {float(count): functools.partial(turn, count) for count in clients}
        seconds = every_round(turns, served.args.rounds, lambda value: growth_curves.amount(value, "s"))
    expected = EXPECTED["clients"]
    series = [
        Series("time of an answer (p50)", "s", seconds, expected["time"]),
        Series("answers a second", "answers/s", speeds, expected["speed"]),
        Series("memory of the server", "bytes", held, expected["held"]),
    ]
    return Curve("clients", "clients at once", "a client", series)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
