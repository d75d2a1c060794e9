"""bench/calibration.py: one scoring for four methods, drawn and compared by definition; and its sets of texts."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from support.inputs import ROOT, write_rows

from bench import calibration
from common.tasks.ranking.task import from_yaml
from common.tasks.ranking.torch_ranker import TorchRanker

pytestmark = pytest.mark.processes
TASK = str(ROOT / "recipes" / "tweet_sentiment.yaml")


@pytest.fixture
def data(tmp_path):
    labels = from_yaml(TASK).labels
    for part, each in (("val", (12, 4, 8)), ("dev", (3, 2, 4))):
        rows = [{"text": f"{part} {label} {n}", "label": label} for label, count in zip(labels, each, strict=True)
                for n in range(count)]  # fmt: skip
        write_rows(tmp_path / f"tweet_sentiment_{part}.jsonl", rows)
    return tmp_path


def test_four_methods_share_one_scoring(base, data, capsys, monkeypatch):
    seen = []
    scoring = TorchRanker.raw_scores
    monkeypatch.setattr(TorchRanker, "raw_scores", lambda self, texts: seen.extend(texts) or scoring(self, texts))
    command = ["--model_dir", base, "--task", TASK, "--data_dir", str(data), "--keep", str(data / "kept")]
    calibration.main(command)
    shown = capsys.readouterr().out
    null_inputs = list(from_yaml(TASK).null_inputs)
    assert sorted(text for text in seen if text not in null_inputs) == sorted(set(seen) - set(null_inputs))  # each once
    entries = json.loads(shown.splitlines()[-1])["rows"]
    assert [entry["method"] for entry in entries] == ["none", "prior", "batch", "fitted"] * 2
    assert [(entry["draw"], entry["n"], entry["dev_rows"]) for entry in entries[::4]] == [
        ("balanced", 12, 6), ("as in the file", 8, 6)]  # fmt: skip
    for entry in entries:
        none = next(other for other in entries if (other["draw"], other["method"]) == (entry["draw"], "none"))
        for measure, difference in entry["minus_none"].items():
            assert difference["value"] == pytest.approx(entry[measure]["value"] - none[measure]["value"], abs=2e-6)
    assert "### Untrained, labels balanced" in shown and "| fitted |" in shown

    seen.clear()
    calibration.main(command)
    assert set(seen) <= set(null_inputs)  # the scores are kept
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == entries


def test_rows_as_frequent_as_in_the_file():
    y = np.repeat([0, 1, 2], 30)
    kept = calibration.as_frequent(y, np.array([0.5, 0.4, 0.1]), seed=0)
    assert np.bincount(y[kept]).tolist() == [30, 24, 6] and (np.diff(kept) > 0).all()


@pytest.mark.parametrize(
    ("measure", "low", "high", "found"),
    [("accuracy", 0.1, 0.3, 1), ("accuracy", -0.3, -0.1, -1), ("nll", 0.1, 0.3, -1), ("ece", -0.1, 0.1, 0)],
)
def test_a_difference_counts_where_its_interval_holds_no_zero(measure, low, high, found):
    entry = {"minus_none": {measure: {"value": (low + high) / 2, "low": low, "high": high}}}
    assert calibration.verdict(entry, measure) == found


def make(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "recipes" / "make_label_sets.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_text_sets_come_from_the_public_files(tmp_path):
    def archive(path, files: dict[str, bytes]) -> bytes:
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path.read_bytes()

    rated = {
        f"hutto_ICWSM_2014/{name}_GroundTruth.txt": f"1_1\t-2.1\tBad {name} &amp; so on\n1_2\t0.2\tSome\n".encode()
        for name in ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
    }
    inner = archive(tmp_path / "hutto_ICWSM_2014.tar.gz", rated)
    archive(tmp_path / "vader.tar.gz", {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    squad = {"data": [{"title": title, "paragraphs": [{"qas": [{"question": f"What is {title}? "}]}]}
                      for title in ("Kenya", "Normans")]}  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    files = ["--vader", str(tmp_path / "vader.tar.gz"), "--squad", str(tmp_path / "squad.json")]
    done = make(*files, "--outdir", str(tmp_path))
    assert done.returncode == 0, done.stderr

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    assert rows("tweet_sentiment") == [
        {"text": "Bad tweets & so on", "label": "Negative"}, {"text": "Some", "label": "Neutral"}]  # fmt: skip
    assert rows("sentence_source")[-1] == {
        "text": "Some", "label": "Newspaper editorial", "document": "nytEditorialSnippets 1"}  # fmt: skip
    assert rows("squad_topic") == [{"text": "What is Kenya?", "label": "Kenya", "passage": "Kenya 0"}]
    for name in ("tweet_sentiment", "sentence_source", "squad_topic"):  # labels are those of the recipes
        task = from_yaml(str(ROOT / "recipes" / f"{name}.yaml"))
        assert {row["label"] for row in rows(name)} <= set(task.labels)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.tar.gz").write_text("x")
    done = make("--vader", str(tmp_path / "other.tar.gz"))
    assert done.returncode == 2 and "is not the source package of vaderSentiment" in done.stderr
    assert "give --vader, --squad or both" in make().stderr
