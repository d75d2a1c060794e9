"""Label sets that people wrote, from two public files: the rows of bench/calibration.py's text sets.

    pip download --no-deps --no-binary :all: --dest data vaderSentiment==3.3.2
    python recipes/make_label_sets.py --vader data/vaderSentiment-3.3.2.tar.gz --squad data/squad-v1.1.json
    python creditmix_prepare.py --task recipes/tweet_sentiment.yaml --src data/tweet_sentiment.jsonl --outdir data

Writes tweet_sentiment.jsonl and sentence_source.jsonl (Hutto and Gilbert 2014: sentences of tweets, film reviews,
product reviews and editorials, each rated by twenty people; in the source package of vaderSentiment) and
squad_topic.jsonl (Rajpurkar et al. 2016: a question of SQuAD, and the article that it is about). A file that is not
given is left out. Labels, prompts and groups are those of the YAML files beside this script.
"""

from __future__ import annotations

import argparse
import html
import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run by its path

from common import cli
from common.files import read_json, write_jsonl

RATED = 0.5  # of -4 to 4: a mean rating that is less far from 0 is called neutral
SOURCES = {  # file of the archive: label
    "tweets": "Tweet",
    "movieReviewSnippets": "Film review",
    "amazonReviewSnippets": "Product review",
    "nytEditorialSnippets": "Newspaper editorial",
}
TOPICS = ("Steam_engine", "Kenya", "Oxygen", "Chloroplast", "Nikola_Tesla", "Martin_Luther",
          "American_Broadcasting_Company", "Victoria_and_Albert_Museum")  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="recipes/make_label_sets.py")
    parser.add_argument("--vader", metavar="FILE.tar.gz", help="the source package of vaderSentiment 3.3.2")
    parser.add_argument("--squad", metavar="FILE.json", help="SQuAD v1.1, the development set")
    parser.add_argument("--outdir", default="data")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if not (args.vader or args.squad):
        raise cli.UserError("give --vader, --squad or both: the files that the rows are made of")
    made = {}
    if args.vader:
        sentences = rated_sentences(args.vader)
        made["tweet_sentiment"] = list(sentiments(sentences["tweets"]))
        made["sentence_source"] = list(sources(sentences))
    if args.squad:
        made["squad_topic"] = list(topics(args.squad))
    for name, rows in made.items():
        path = Path(args.outdir) / f"{name}.jsonl"
        print(f"{path}: {write_jsonl(path, rows):,} rows")


def rated_sentences(path: str) -> dict[str, list[tuple[str, float, str]]]:
    """(its number, mean rating, sentence) of each file in the archive that lies in vaderSentiment's source package.

    Raises:
        UserError: another package, or none.
    """
    try:
        with tarfile.open(path) as package:
            inner = next(name for name in package.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=io.BytesIO(package.extractfile(inner).read())) as archive:
                return {
                    name: [
                        (number, float(rating), html.unescape(text).strip())
                        for line in archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
                        for number, rating, text in [line.decode("utf-8", "replace").split("\t", 2)]
                    ]
                    for name in SOURCES
                }
    except (OSError, tarfile.TarError, StopIteration, KeyError, ValueError) as error:
        raise cli.UserError(f"--vader {path} is not the source package of vaderSentiment 3.3.2 ({error})") from error


def sentiments(tweets: Sequence[tuple[str, float, str]]) -> Iterator[dict]:
    for _, rating, text in tweets:
        yield {"text": text, "label": "Neutral" if abs(rating) < RATED else "Positive" if rating > 0 else "Negative"}


def sources(sentences: dict[str, list[tuple[str, float, str]]]) -> Iterator[dict]:
    """Reviews of products and editorials are cut into sentences, whose numbers are DOCUMENT_SENTENCE."""
    for name, rows in sentences.items():
        for number, _, text in rows:
            yield {"text": text, "label": SOURCES[name], "document": f"{name} {number.partition('_')[0]}"}


def topics(path: str) -> Iterator[dict]:
    """Raises UserError where the file is not SQuAD's."""
    content = read_json(path)
    try:
        for article in content["data"]:
            for number, passage in enumerate(article["paragraphs"] if article["title"] in TOPICS else ()):
                for question in passage["qas"]:
                    text, label = question["question"].strip(), article["title"].replace("_", " ")
                    yield {"text": text, "label": label, "passage": f"{label} {number}"}
    except (KeyError, TypeError, AttributeError) as error:
        raise cli.UserError(f"--squad {path} is not SQuAD v1.1 ({error!r})") from error


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
