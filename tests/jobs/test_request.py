"""From a payload to commands: the real scripts' flags, what is refused before it is queued, and nothing that leaks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from support.inputs import CORPUS, ROOT, write_rows
from support.jobs_served import serve_jobs
from support.models import build_base
from support.processes import LONGEST

import export_model
from common.cli import UserError
from common.export.formats import FORMATS, QUANTS
from common.jobs import checks as job_checks
from common.jobs import export_check
from common.jobs import proof_rows as job_proof
from common.jobs.backend import Device
from common.jobs.checks import DoesNotFit, Reach, Vocabularies, check_memory
from common.jobs.request import EXPORTS, METHODS, RANGES, Planner
from common.jobs.routes import EXAMPLE
from common.models import llama_cpp
from common.training.settings import TrainSettings
from common.web.app import Problem


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer) -> Path:
    """An allowed folder: two models with one vocabulary, a third with another, data files."""
    from common.models import tokenizers
    from common.training import miniature

    folder = tmp_path_factory.mktemp("allowed")
    build_base(folder / "student", tokenizer)
    build_base(folder / "teacher", tokenizer, hidden=48)
    build_base(folder / "stranger", tokenizers.align(miniature.build_tokenizer(CORPUS[:3], vocab_size=300)))
    (folder / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n')
    (folder / "text.txt").write_text("\n".join(CORPUS))
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def planner(data) -> Planner:
    return Planner(ROOT, data / "service", Reach([data]))


def payload(data: Path, **more) -> dict:
    """The recipe's own request, with local names in place of the Hub's."""
    local = {name: str(data / name) for name in ("teacher", "student")}
    names = {"teacher_model": local["teacher"], "student_model": local["student"], "dataset": str(data / "text.txt")}
    return {**EXAMPLE, **names, "subset": None, **more}


def words(plan) -> dict[str, str]:
    """The training's command line as {flag: value}."""
    script, *argv = next(command["argv"] for command in plan.commands if command["output"] == "")
    assert Path(script).is_file()
    return dict(word.removeprefix("--").partition("=")[::2] for word in argv)


def refused(planner, body: dict) -> tuple[str, str]:
    """(field, message)"""
    with pytest.raises(Problem) as raised:
        planner.plan(body, Path("/nowhere"))
    assert raised.value.status_code == 422
    return raised.value.param, str(raised.value.detail)


def test_the_recipes_payload(planner, data, tmp_path):
    more = {
        "alpha_kl": 0.7, "beta_ce": 0.3, "gamma_mse": 0.05, "delta_cos": 0.05, "epsilon_attn": 0.0, "lora_r": 8,
        "lora_alpha": 16, "lora_dropout": 0.05, "use_qat": False, "post_training_quant": True, "export_onnx": True,
        "lr": 1e-4, "weight_decay": 0.01, "warmup_steps": 10, "split": "train", "text_column": "text",
    }  # fmt: skip
    plan = planner.plan(payload(data, **more), tmp_path / "run")
    assert plan.method == "distill"
    settings = plan.settings.as_dict()
    wanted = {
        "teacher": str(data / "teacher"), "student": str(data / "student"), "data": str(data / "text.txt"),
        "max_steps": 30, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 1e-4,
        "save_steps": 30, "logging_steps": 5, "temperature": 2.0, "forward_kl": 0.7, "teacher_ce": 0.3,
        "hidden_mse": 0.05, "hidden_cosine": 0.05, "attention_mse": 0.0, "lora_r": 8, "lora_alpha": 16,
        "weight_decay": 0.01, "warmup_steps": 10, "save_dir": str(tmp_path / "run"), "subset": None,
    }  # fmt: skip
    assert {name: settings[name] for name in wanted} == wanted
    proof, training, *exports = plan.commands  # rows that cannot be compared on are found before the training
    assert training["output"] == ""
    assert [Path(export["argv"][0]).name for export in exports] == ["export_model.py"] * 2
    assert [export["output"] for export in exports] == ["int8", "onnx"]
    rows = tmp_path / "proof.jsonl"
    argv = ["-m", "common.jobs.proof_rows", f"--output={rows}", f"--data={data / 'text.txt'}"]
    assert proof == {"argv": argv, "output": None}
    run = tmp_path / "run"
    assert [export["argv"][1:] for export in exports] == [
        [f"--model_dir={run}", f"--format={name}", f"--save_dir={run / name}", f"--proof_data={rows}"]
        for name in ("int8", "onnx")
    ]


def test_proof_rows(tmp_path):
    words = [f"w{number}" for number in range(64 * 100 + 10)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    job_proof.main(["--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 64
    assert (rows[1]["input"].split(), rows[1]["output"].split()) == (words[64:112], words[112:128])
    (tmp_path / "dpo.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    job_proof.main(["--data", str(tmp_path / "dpo.jsonl"), "--output", str(tmp_path / "out.jsonl")])
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"input": "p", "output": "c"}
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    job_proof.main(["--data", str(tmp_path / "chat.jsonl"), "--output", str(tmp_path / "out.jsonl")])
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"messages": turns}


def test_proof_rows_of_short_texts_and_of_rows_without_answers(tmp_path):
    """Texts go on in one another, as a file of lines does; what has no answer says what to set."""
    texts = [" ".join(f"w{40 * row + word}" for word in range(40)) for row in range(4)]
    argv = ["--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    job_proof.main(argv)
    pairs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert " ".join(f"{pair['input']} {pair['output']}" for pair in pairs).split() == " ".join(texts).split()[:128]
    write_rows(tmp_path / "rows.jsonl", [{"text": "too short"}])
    with pytest.raises(UserError, match="has fewer than 64 words; give more, or set no_proof"):
        job_proof.main(argv)
    for row in ({"input": "Hi"}, {"prompt": "Hi"}, {"input": "Hi", "probabilities": {"Good": 0.9, "Bad": 0.1}}):
        write_rows(tmp_path / "rows.jsonl", [row] * 3)
        with pytest.raises(UserError, match=r"no rows with answers, .*; set no_proof to export without a proof"):
            job_proof.main(argv)
    write_rows(tmp_path / "rows.jsonl", [{"input": "Hi"}, {"input": "Hi", "teacher_output": "Hello"}])
    job_proof.main(argv)
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"input": "Hi", "output": "Hello"}


def test_a_data_set_is_passed_on_with_its_part(planner, data, monkeypatch):
    monkeypatch.setattr(planner.reach, "ask_hub", lambda kind, name: None)
    body = payload(data) | {"dataset": "wikitext", "subset": "wikitext-2-raw-v1", "export_onnx": True}
    plan = planner.plan(body, Path("job/artifacts"))
    assert (plan.settings.dataset, plan.settings.subset, plan.settings.data) == ("wikitext", "wikitext-2-raw-v1", None)
    assert plan.commands[0]["argv"][2:] == [
        "--output=job/proof.jsonl", "--dataset=wikitext", "--subset=wikitext-2-raw-v1", "--split=train",
        "--text_column=text"]  # fmt: skip


def test_of_a_file_no_part_and_no_column_is_asked_for(planner, data):
    """A text file has neither, so that what is asked of it means nothing; of rows it would, and is not done."""
    more = {"subset": "all", "split": "test", "text_column": "body"}
    plan = planner.plan(payload(data, **more), Path("run"))
    assert (plan.settings.data, plan.settings.split, plan.settings.dataset) == (str(data / "text.txt"), "train", None)
    rows = payload(data) | {"dataset": str(data / "rows.jsonl")}
    for field, value in more.items():
        sentence = f"{field}: the dataset is a file, which has no {field}; leave it out"
        assert refused(planner, rows | {field: value}) == (field, sentence)
    assert planner.plan(rows | {"split": "train", "text_column": "text"}, Path("run")).settings.data == rows["dataset"]


def test_exports_without_a_proof(planner, data):
    """No rows are written for one, and the exporter is told; without an export there is nothing to leave out."""
    body = payload(data) | {"export_onnx": True, "post_training_quant": True, "no_proof": True}
    commands = planner.plan(body, Path("job/artifacts")).commands
    assert [command["output"] for command in commands] == ["", "int8", "onnx"]
    for command in commands[1:]:
        assert command["argv"][-1] == "--no_proof" and not any("proof_data" in word for word in command["argv"])
        export_model.build_parser().parse_args(command["argv"][1:])
    with pytest.raises(Problem, match="no_proof: goes with exports; list some, or leave it out"):
        planner.plan(payload(data, no_proof=True), Path("run"))


@pytest.mark.parametrize(
    ("export", "package", "file"),
    [
        ("gguf-Q8_0", "xllamacpp", "requirements/export.txt"),
        ("onnx_genai", "onnxruntime_genai", "requirements/export.txt"),
        ("int8", "onnxruntime", "requirements.txt"),
    ],
)
def test_an_export_that_lacks_a_package_is_refused_before_the_training(data, monkeypatch, export, package, file):
    """At once where jobs run with the service's packages; elsewhere by a command that comes first there."""
    monkeypatch.setitem(sys.modules, package, None)
    llama_cpp.library.cache_clear()
    body = payload(data, exports=[export])
    field, message = refused(Planner(ROOT, data / "service", Reach([data])), body)
    assert field == "exports" and message.startswith("exports: ") and "--" not in message
    assert f"which is not installed; pip install -r {file}" in message
    planner = Planner(ROOT, data / "service", Reach([data]), elsewhere=True)
    for more in ({}, {"no_proof": True}):
        first, *_, training, exporting = planner.plan(body | more, Path("run")).commands
        assert (training["output"], exporting["output"]) == ("", export)
        module, name, *words = first["argv"]
        assert (module, name, first["output"]) == ("-m", "common.jobs.export_check", None)
        if export != "gguf-Q8_0" or not more:  # which llama.cpp proves, and does not write
            with pytest.raises(UserError, match=f"pip install -r {file}"):
                export_check.main(words)
        else:
            export_check.main(words)
    assert planner.plan(payload(data), Path("run")).commands[0]["output"] == ""
    llama_cpp.library.cache_clear()


def test_all_that_the_exporter_writes_can_be_asked_for(planner, data):
    """Each of its formats, and a GGUF in each of its quantisations; what two names ask for is made once."""
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("xllamacpp")
    listed = list(EXPORTS)
    body = payload(data, exports=[*listed, "int8"], post_training_quant=True, lora_r=4)
    _, _, *commands = planner.plan(body, Path("job/artifacts")).commands
    assert [command["output"] for command in commands] == ["int8", *(name for name in listed if name != "int8")]
    made = [export_model.build_parser().parse_args(command["argv"][1:]) for command in commands]
    assert {args.format for args in made} == set(FORMATS)
    assert {args.quant for args in made if args.format == "gguf"} == set(QUANTS)
    assert [args.save_dir for args in made] == [f"job/artifacts/{command['output']}" for command in commands]
    schema = planner.schema()["properties"]["exports"]
    assert schema["items"]["enum"] == listed and "gguf-Q4_K_M" in listed
    assert "gguf_lora is an adapter alone" in refused(planner, payload(data, exports=["gguf_lora"]))[1]


def test_a_distilled_student_is_a_whole_model_unless_an_adapter_is_asked_for(planner, data):
    assert planner.plan(payload(data), Path("run")).settings.lora_r == 0
    assert planner.plan(payload(data, lora_r=4), Path("run")).settings.lora_r == 4
    body = {"method": "sft", "student": str(data / "student"), "data": str(data / "rows.jsonl")}
    assert planner.plan(body, Path("run")).settings.lora_r == 16  # the script's own default
    (data / "adapter").mkdir()
    (data / "adapter" / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}')
    started = planner.plan(payload(data, init_adapter=str(data / "adapter")), Path("run")).settings
    assert (started.lora_r, started.lora_alpha, started.lora_dropout) == (8, 16, 0.1)
    field, message = refused(planner, body | {"init_adapter": str(data / "adapter"), "lora_r": 4})
    assert field == "lora_r" and "goes on with its own, 8; leave it out" in message


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_command_is_one_that_the_script_takes(planner, data, method):
    body = {
        "method": method,
        "student_model": str(data / "student"),
        "data": str(data / "rows.jsonl"),
        "idp_mode": True,
    }
    body |= {"teacher": str(data / "teacher")} if method == "distill" else {}
    plan = planner.plan(body | {"seed": 7, "skip_bad_rows": False, "lr_scheduler_type": "linear"}, Path("run"))
    script, *argv = plan.commands[0]["argv"]
    assert Path(script) == ROOT / METHODS[method].script
    assert "--idp_mode" in argv
    assert "--skip_bad_rows" not in argv
    again = METHODS[method].settings_of(planner.parser(method).parse_args(argv))
    assert again == plan.settings
    assert (again.seed, again.lr_scheduler_type, again.save_dir) == (7, "linear", "run")


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"method": "rlhf"}, "method", "must be one of distill, sft, kd, dpo"),
        ({"method": ["sft"]}, "method", "must be one of"),
        ({"max_steps": "30"}, "max_steps", "must be a whole number"),
        ({"max_steps": 3.5}, "max_steps", "must be a whole number"),
        ({"max_steps": True}, "max_steps", "must be a whole number"),
        ({"max_steps": 0}, "max_steps", "above 0"),
        ({"max_steps": 10**400}, "max_steps", "must be between"),
        ({"per_device_batch_size": 0}, "per_device_batch_size", "must be between 1 and"),
        ({"lr": -1e-4}, "lr", "must be between"),
        ({"lr": float("nan")}, "lr", "must be between"),
        ({"temperature": 0}, "temperature", "must be between"),
        ({"lora_dropout": 1.0}, "lora_dropout", "must be between 0 and 0.999"),
        ({"alpha_kl": -1}, "alpha_kl", "must be between 0"),
        ({"alpha_kl": 0, "beta_ce": 0}, "alpha_kl", "weight 0"),
        ({"alpha_kl": 1, "gamma_kl": 1}, "gamma_kl", "alpha_kl are names of one setting"),
        ({"student": "x"}, "student", "student_model are names of one setting"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type", "must be one of cosine"),
        ({"save_dir": "/tmp/x"}, "save_dir", "no setting of the method distill"),
        ({"output_dir": "/tmp/x"}, "output_dir", "no setting"),
        ({"config": "x.yaml"}, "config", "no setting"),
        ({"trust_remote_code": True}, "trust_remote_code", "no setting"),
        ({"resume": True}, "resume", "no setting"),
        ({"report_to": "wandb"}, "report_to", "no setting"),
        ({"ünknown": 1}, "\\xfcnknown", "no setting"),
        ({"text_column": "a\x00b"}, "text_column", "printable"),
        ({"text_column": "\ud800"}, "text_column", "printable"),
        ({"text_column": " "}, "text_column", "printable"),
        ({"text_column": "x" * 5000}, "text_column", "printable"),
        ({"subset": "../../etc"}, "subset", "must not be a path"),
        ({"exports": "gguf-Q8_0"}, "exports", "must be a list of some of merged, onnx, int8"),
        ({"exports": []}, "exports", "must be a list"),
        ({"exports": ["gguf"]}, "exports", "must be a list"),
        ({"exports": [{}]}, "exports", "must be a list"),
        ({"post_training_quant": "yes"}, "post_training_quant", "must be true or false"),
        ({"dataset": None}, "data", "give data or dataset"),
        ({"data": "rows.jsonl"}, "data", "give data or dataset, one of the two"),
        ({"teacher_model": None}, "teacher", "--teacher is missing"),
        ({"student_model": None}, "student", "required"),
        ({"teacher_cache": "../x"}, "teacher_cache", "not a path"),
        ({"teacher_cache": "x", "epsilon_attn": 1.0}, "epsilon_attn", "needs a live teacher"),
        ({"layer_map": "5", "labels": "yes"}, "labels", "must be true or false"),
    ],
)  # fmt: skip
def test_what_is_refused(planner, data, change, field, message):
    blamed, sentence = refused(planner, payload(data) | change)
    assert blamed == field, sentence
    assert message in sentence
    assert sentence.startswith(field)


def test_a_cache_is_a_name_in_the_services_own_folder(planner, data):
    plan = planner.plan(payload(data, teacher_cache="squad-gpt2"), Path("run"))
    assert plan.settings.teacher_cache == str(data / "service" / "caches" / "squad-gpt2")


def test_quantisation_aware_training(planner, data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if torchao were installed
    body = {"method": "sft", "student": str(data / "student"), "data": str(data / "rows.jsonl"), "use_qat": True}
    settings = planner.plan(body, Path("run")).settings
    assert (settings.quantization_aware, settings.lora_r) == ("int8", 0)
    assert refused(planner, body | {"lora_r": 8})[0] == "use_qat"
    settings = planner.plan(payload(data, use_qat=True), Path("run")).settings
    assert (settings.quantization_aware, settings.lora_r, bool(settings.teacher)) == ("int8", 0, True)
    assert planner.plan(body | {"use_qat": False}, Path("run")).settings.quantization_aware is None


# Names and places.


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_place_that_is_not_allowed_is_like_one_that_is_not_there(planner, data, tmp_path, offline, monkeypatch):
    secret = tmp_path / "secret"
    build = secret / "model"
    build.mkdir(parents=True)
    (build / "config.json").write_text("{}")
    (secret / "rows.jsonl").write_text("{}\n")
    (data / "link").symlink_to(build)
    (data / "rows_link.jsonl").symlink_to(secret / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    sibling = Path(f"{data}_sibling")  # the allowed root is a prefix of its name
    sibling.mkdir(exist_ok=True)
    (sibling / "rows.jsonl").write_text("{}\n")
    there = [str(build), "secret/model", str(data / "link"), f"{data}/../../{build.relative_to('/')}", "/etc",
             str(ROOT), "/proc/self/root" + str(build)]  # fmt: skip
    for name in there:
        for field in ("student_model", "teacher_model", "dataset"):
            missing = name + "_not_there"
            refusal = refused(planner, payload(data) | {field: name})
            assert refusal == (field, refused(planner, payload(data) | {field: missing})[1].replace(missing, name))
            assert refusal[0] == field
    rows = {"method": "sft", "student": str(data / "student")}
    for name in (str(secret / "rows.jsonl"), str(data / "rows_link.jsonl"), str(sibling / "rows.jsonl"), "/etc/passwd"):
        refusal = refused(planner, rows | {"data": name})
        assert refusal == ("data", f"data: there is no file {name!r} under the allowed folders (ALLOWED_ROOTS)")
        assert refused(planner, rows | {"data": name + "x"})[1] == refusal[1].replace(name, name + "x")
    assert refused(planner, rows | {"data": str(data / "empty")})[0] == "data"
    assert "holds no model" in refused(planner, payload(data) | {"student_model": str(data / "empty")})[1]
    assert "no folder" in refused(planner, rows | {"data": str(data / "rows.jsonl"), "init_adapter": "/etc"})[1]


def test_a_name_of_the_hub_offline_is_refused_at_once(planner, data, offline):
    for field, kind in (("teacher_model", "model"), ("student_model", "model"), ("dataset", "data set")):
        blamed, sentence = refused(planner, payload(data) | {field: "nobody/nothing"})
        assert blamed == field
        assert "cannot be reached: this machine is offline" in sentence
        assert kind.replace("data set", "dataset") in sentence


def test_a_hub_that_does_not_answer_is_not_waited_for(data, monkeypatch):
    import threading

    from huggingface_hub import HfApi

    hung = threading.Event()
    monkeypatch.setattr(job_checks, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **more: hung.wait(LONGEST))
    blamed, sentence = refused(Planner(ROOT, data, Reach([data])), payload(data) | {"student_model": "gpt2"})
    assert (blamed, "did not answer within 0.2 s" in sentence) == ("student_model", True)
    hung.set()


def test_what_the_hub_says(data, monkeypatch):
    import httpx2
    from huggingface_hub import HfApi, errors

    asked = []

    def info(self, name, timeout):
        asked.append(name)
        assert timeout == job_checks.HUB_SECONDS
        answer = httpx2.Response(404, request=httpx2.Request("GET", "http://hub"))
        if name == "gone/model":
            raise errors.RepositoryNotFoundError("no", response=answer)
        if name == "gated/model":
            raise errors.GatedRepoError("no", response=answer)
        if name == "broken/model":
            raise httpx2.ConnectError("no network")

    monkeypatch.setattr(HfApi, "model_info", info)
    monkeypatch.setattr(HfApi, "dataset_info", info)
    reach = Reach([data])
    assert reach.model("student", "org/model") == reach.model("student", "org/model") == "org/model"
    assert reach.dataset("dataset", "wikitext") == "wikitext"
    assert asked == ["org/model", "wikitext"]  # a yes is remembered
    for name, words in (("gone", "none on the Hub"), ("gated", "set HF_TOKEN"), ("broken", "cannot be asked (Connect")):
        with pytest.raises(Problem, match=words.replace("(", "[(]")):
            reach.model("student", f"{name}/model")
    for name in ("a/b/c", "-x", "a b", "https://x", "x" * 200, "../x", "/x"):
        with pytest.raises(Problem, match="there is no model"):
            reach.model("student", name)


# Vocabulary and memory.


def test_a_teacher_with_another_vocabulary(data):
    vocabularies = Vocabularies()
    student = str(data / "student")
    vocabularies.check(str(data / "teacher"), student)
    with pytest.raises(Problem, match="its tokenizer is not the student's") as raised:
        vocabularies.check(str(data / "stranger"), student)
    assert raised.value.param == "teacher"
    assert len(vocabularies.differences) == 2  # each pair is compared once
    vocabularies.check(str(data / "teacher"), student)
    assert len(vocabularies.differences) == 2


def test_memory_is_predicted(planner, data):
    body = {"method": "sft", "student": str(data / "student"), "data": str(data / "rows.jsonl"), "max_len": 512}
    settings = planner.plan(body | {"per_device_train_batch_size": 16}, Path("run")).settings
    check_memory(settings, Device(False, 1 << 40))
    check_memory(settings, Device(True, 1 << 40))
    check_memory(settings, Device(False, None))
    with pytest.raises(Problem, match="no settings need less") as raised:
        check_memory(settings, Device(False, 1 << 20))
    assert raised.value.param == "student"


def test_a_large_model_on_a_small_card(planner, data):
    """Qwen's 3B fits 8 GB with the recipe; with all weights it does not, and the answer names what would."""
    from common.vram.model_shape import QWEN_3B

    (data / "qwen").mkdir(exist_ok=True)
    (data / "qwen" / "config.json").write_text(json.dumps(QWEN_3B))
    body = {"method": "sft", "student": str(data / "qwen"), "data": str(data / "rows.jsonl")}
    card = Device(True, 8_188 << 20)
    check_memory(planner.plan(body, Path("run")).settings, card)
    with pytest.raises(Problem) as raised:
        check_memory(planner.plan(body | {"lora_r": 0}, Path("run")).settings, card)
    assert (raised.value.status_code, raised.value.param) == (422, "student")
    assert str(raised.value.detail).endswith("; take lora_r=16, or a smaller student")
    wide = planner.plan(body | {"per_device_train_batch_size": 64, "max_len": 1024}, Path("run")).settings
    with pytest.raises(Problem, match="it would fit with per_device_train_batch_size=") as raised:
        check_memory(wide, card)
    assert raised.value.param == "per_device_train_batch_size"
    assert wide.per_device_train_batch_size == 64  # the request itself is not changed


@pytest.mark.parametrize("body", [{"per_device_train_batch_size": 64}, {"max_len": 4096}, {"method": "distill"}])
def test_what_would_fit_can_be_sent(planner, data, body):
    """The fields of the answer, added to the request that was refused, make one that is taken."""
    from common.vram.model_shape import QWEN_3B, QWEN_7B

    for name, shape in (("qwen", QWEN_3B), ("seven", QWEN_7B)):
        (data / name).mkdir(exist_ok=True)
        (data / name / "config.json").write_text(json.dumps(shape))
    body = {"method": "sft", "student": str(data / "qwen"), "data": str(data / "rows.jsonl")} | body
    if body["method"] == "distill":
        body |= {"teacher": str(data / "seven"), "lora_r": 16}
    card = Device(True, 8_188 << 20)
    with pytest.raises(DoesNotFit) as raised:
        check_memory(planner.plan(body, Path("run")).settings, card)
    changes = dict(field.split("=") for field in str(raised.value.detail).partition("fit with ")[2].split(", "))
    assert ("teacher_cache" in changes) == (body["method"] == "distill")
    more = {field: int(value) if value.isdigit() else value for field, value in changes.items()}
    check_memory(planner.plan(body | more, Path("run")).settings, card)


def test_a_model_of_an_unknown_kind_passes(data):
    (data / "empty" / "config.json").write_text('{"model_type": "odd"}')
    settings = TrainSettings(student=str(data / "empty"), save_dir="run")
    check_memory(settings, Device(True, 1))
    (data / "empty" / "config.json").unlink()


@pytest.mark.processes
def test_the_example_runs_offline(data):
    """The payload of the recipe, with local models and a text file, by the real trainer."""
    with serve_jobs(data, data_dir=data / "service", scripts=ROOT) as served:
        body = payload(data, max_steps=2, grad_accum_steps=1, logging_steps=1, save_every=2, max_len=64)
        status, answer, _ = served.ask("POST", "/distill", body)
        assert status == 202, answer
        status = served.until(answer["job_id"])
        assert status["state"] == "succeeded", status["error"]
        assert status["progress"]["step"] == 2
        assert status["losses"].keys() >= {"loss", "forward_kl", "ce"}
        listed = {entry["path"] for entry in served.ask("GET", f"/artifacts/{answer['job_id']}")[1]["artifacts"]}
        assert listed >= {"model.safetensors", "config.json", "tokenizer.json", "run.json", "loss.csv", "loss.png"}
        config = served.ask("GET", f"/download/{answer['job_id']}/config.json")[1]
        assert config["model_type"] == "qwen2"


def test_all_of_it_over_http(data, offline):
    """The checks in their place: before anything is queued, with the field that is to blame."""
    scripts = data.parent / "scripts"
    if not scripts.exists():
        from support.jobs_served import make_place

        make_place(data.parent)
    with serve_jobs(data, scripts=ROOT) as served:
        for change, field in (
            ({"teacher_model": str(data / "stranger")}, "teacher"),
            ({"student_model": "distilgpt2"}, "student_model"),
            ({"temperature": -1}, "temperature"),
            ({"dataset": "/etc/passwd"}, "dataset"),
        ):
            status, answer, _ = served.ask("POST", "/distill", payload(data) | change)
            assert (status, answer["error"]["param"]) == (422, field), answer
        assert served.ask("POST", "/distill", b"[]")[0] == 422
        assert served.ask("POST", "/distill", b"{")[0] == 400
        assert served.ask("GET", "/jobs")[1] == {"jobs": [], "next": None}
        schema = served.service.planner.schema()["properties"]
        assert set(RANGES) <= set(schema)
        assert schema["jsd"]["description"].endswith("(methods: distill)")
        assert os.listdir(served.service.jobs_dir) == []
