"""Decisions: OpenAI's client and System One's shape against the server, with a run's own calibration and without."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.inputs import ROOT
from support.processes import wait_for
from support.served import ROWS, make_run, metric, serve

from common.data import task_record
from common.models.source import ModelSource
from common.tasks.ranking.calibration import Calibration, batch_calibration
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.decision import Decision
from common.tasks.ranking.loading import load_task
from common.tasks.ranking.questions import choice, predicate
from common.tasks.ranking.torch_ranker import naive_scores

pytestmark = pytest.mark.processes

TICKETS = load_task(str(ROOT / "recipes" / "ticket_severity.yaml"))
TEXT = "Mail. Users affected: 3, Hours open: 2, mails arrive an hour late, no workaround"


def one_of(instructions: str, values, **more) -> dict:
    return {"type": "choice", "instructions": instructions, "choices": [{"value": value} for value in values], **more}


OWN = one_of(CREDITMIX.instruction, CREDITMIX.labels, name="mix")
TEAMS = ["Accounts payable", "Accounts receivable", "Nobody's business"]  # several tokens each, with one beginning
TEAM = one_of("Which team?", TEAMS)
SPAM = {"type": "predicate", "name": "spam", "instructions": "The message is spam."}


def body(*questions: dict, model: str = "sft", given=ROWS[0], **more) -> dict:
    return {"model": model, "input": given, "questions": [*questions], **more}


@pytest.fixture
def client(served):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


def scored(folder, task, text: str) -> np.ndarray:
    """Probabilities by the definition: one full pass for each label, less the prior."""
    classifier = Classifier.load(ModelSource(str(folder)), CREDITMIX)
    model, tokenizer = classifier.ranker.model, classifier.ranker.tokenizer
    prior = naive_scores(model, tokenizer, task, task.null_inputs).mean(axis=0)
    raw = naive_scores(model, tokenizer, task, [text])
    return Calibration(task.labels, "prior", tuple(map(float, prior))).apply(raw).probabilities[0]


def test_the_runs_own_question_is_answered_as_infer_answers(client, served, expected):
    order = ["Bad", "Standard", "Good"]
    levels = {"type": "score", "instructions": CREDITMIX.instruction, "levels": [{"label": name} for name in order]}
    for model, name in (("creditmix_kd", "kd"), ("base", "base")):
        decision = client.decisions.create(model=model, input=f" {ROWS[0]} ", questions=[OWN, levels])
        wanted = expected[name][0]["probabilities"]
        chosen, score = decision.answers
        assert (chosen.type, chosen.name, score.name) == ("choice", "mix", None)
        assert {one.value: one.probability for one in chosen.probabilities} == pytest.approx(wanted, abs=1e-4)
        best = max(wanted.values())
        assert chosen.confidence == pytest.approx((best - 1 / 3) / (1 - 1 / 3), abs=1e-4)
        assert [(level.value, level.label) for level in score.probabilities] == [
            *enumerate(["Bad", "Standard", "Good"])
        ]
        assert score.score == pytest.approx(wanted["Standard"] + 2 * wanted["Good"], abs=1e-4)
        assert (decision.model, decision.usage.output_tokens) == (model, 0)
        assert decision.usage.input_tokens == decision.usage.total_tokens > 20
    assert metric(served, "batch_rows_count", 'task="decision"') >= 1


def test_any_question_of_any_run_with_labels_of_several_tokens(client, served, runs):
    described = {**TEAM, "choices": [{"value": team, "description": "all of it"} for team in TEAMS]}
    decision = client.decisions.create(model="sft", input=TEXT, questions=[TEAM, SPAM, described])
    asked = [choice("Which team?", TEAMS, [""] * 3), predicate("The message is spam.")]
    for question, answer in zip(asked, decision.answers, strict=False):
        wanted = scored(runs / "creditmix_sft", question.task(), TEXT)
        shares = [answer.probability, 1 - answer.probability] if answer.type == "predicate" else [
            one.probability for one in answer.probabilities
        ]  # fmt: skip
        assert shares == pytest.approx(wanted, abs=1e-4)
    assert decision.answers[0].choice == TEAMS[int(np.argmax(scored(runs / "creditmix_sft", asked[0].task(), TEXT)))]
    assert decision.answers[2].probabilities != decision.answers[0].probabilities
    assert {path.name for path in (runs / "creditmix_sft").glob("prior*")} <= {"prior.json"}  # none of a request's
    headers = served.ask("POST", "/v1/decisions", body(TEAM, OWN))[2]
    assert headers["x-decision-calibration"] == "prior, none"  # it was trained for its own


def test_booleans_are_not_texts(client):
    question = one_of("Is it late?", [True, False, "unclear"])
    (answer,) = client.decisions.create(model="base", input=TEXT, questions=[question]).answers
    assert [one.value for one in answer.probabilities] == [True, False, "unclear"]
    assert answer.choice in (True, False, "unclear")


def test_fitted_calibration_and_its_abstention(own, base):
    """A class bias decides; below the threshold OpenAI has a refusal, and System One an answer that abstains."""
    run = make_run(own / "severity", base, 5)
    task_record.write(run, TICKETS.record())
    bias, path = (0.0, 40.0, 0.0, 0.0), TICKETS.file_in(run, "calibration")
    Calibration(TICKETS.labels, "fitted", bias=bias).save(path)
    asked = one_of(TICKETS.instruction, TICKETS.labels)
    other = {**asked, "instructions": "How bad is it?"}
    refusing = own / "refusing"
    make_run(refusing, base, 6)
    task_record.write(refusing, TICKETS.record())
    Calibration(TICKETS.labels, "fitted", temperature=1e5, decision=Decision(abstain_below=0.9)).save(
        TICKETS.file_in(refusing, "calibration")
    )
    with serve(own) as served:
        sure, foreign = served.post("/v1/decisions", body(asked, other, model="severity", given=TEXT))["answers"]
        assert (sure["choice"], sure["confidence"]) == ("Medium", 1.0)
        assert foreign["confidence"] < 1
        part = {"type": "input_json", "data": {"ticket": TEXT}}  # a row, as the task reads one
        row = [{"role": "user", "content": [part]}]
        assert served.post("/v1/decisions", body(asked, model="severity", given=row))["answers"] == [sure]
        request = body(asked, SPAM, model="refusing", given=TEXT)
        status, answer, headers = served.ask("POST", "/v1/decisions", request)
        assert (status, headers["x-decision-calibration"]) == (200, "fitted, prior")
        assert answer["answers"][0] == {"type": "refusal", "name": None}
        assert answer["answers"][1]["type"] == "predicate"
        criteria = dict.fromkeys(TICKETS.labels)
        question = {"type": "choice", "instructions": TICKETS.instruction, "criteria": criteria}
        request = {"model": "refusing", "state": {"ticket": TEXT}, "questions": {"q": question}}
        told = served.post("/v1/systemone", request)["answers"]["q"]
        assert told["abstained"] is True
        assert set(told["probabilities"]) == set(TICKETS.labels)
        openai = pytest.importorskip("openai")
        own_client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
        (refusal,) = own_client.decisions.create(model="refusing", input=TEXT, questions=[asked]).answers
        assert refusal.type == "refusal"


def test_a_run_of_documents_answers_questions_too(own, base):
    task_record.write(make_run(own / "forms", base, 7), {"kind": "idp", "name": "idp", "schema": {"type": "object"}})
    with serve(own) as served:
        answer = served.post("/v1/decisions", body(SPAM, OWN, model="forms"))
        assert [one["type"] for one in answer["answers"]] == ["predicate", "choice"]


def test_system_one_in_transformers_shape(served):
    """Each answer has the keys of transformers' own pipeline, and the probabilities of /v1/decisions."""
    from transformers.decision import DecisionConfig, parse_questions

    questions = {
        "team": {"type": "choice", "instructions": "Which team?", "criteria": dict.fromkeys(TEAMS)},
        "spam": {"type": "noul", "instructions": "Is it spam?", "criteria": {"true": "adverts", "false": None}},
        "urgent": {"type": "score", "criteria": ["Can wait", {"when": "this week"}, "Today"]},
    }
    answer = served.post("/v1/systemone", {"model": "kd", "state": {"message": TEXT}, "questions": questions})
    assert set(answer) == {"model", "answers", "usage"}
    assert set(answer["usage"]) == {"input_tokens", "output_tokens"}
    for question in parse_questions(questions, DecisionConfig()):
        theirs = question.answer([1 / len(question.options)] * len(question.options))
        ours = answer["answers"][question.name]
        assert list(ours) == list(theirs)
        assert ours.get("legend") == theirs.get("legend")
        if "probabilities" in theirs:
            assert list(ours["probabilities"]) == list(theirs["probabilities"])
            assert sum(ours["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    same = served.post("/v1/decisions", body(TEAM, model="kd", given=json.dumps({"message": TEXT})))["answers"][0]
    wanted = {one["value"]: one["probability"] for one in same["probabilities"]}
    assert answer["answers"]["team"]["probabilities"] == pytest.approx(wanted, abs=1e-4)


def test_a_conversation_is_read_as_one(served):
    call = {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "3 open"}]}
    turns = [
        {"role": "developer", "content": "Be strict."},
        {"role": "user", "content": [{"type": "input_text", "text": "Help"}, {"type": "input_json", "data": {"a": 1}}]},
        call,
        output,
        {"role": "assistant", "content": [{"type": "output_text", "text": "Done."}]},
    ]
    said = ["developer: Be strict.", 'user: Help\n{"a": 1}', "call of look_up: {}", "look_up returned: 3 open"]
    text = "\n\n".join([*said, "assistant: Done."])
    both = [served.post("/v1/decisions", body(SPAM, given=given)) for given in (turns, text)]
    assert both[0]["usage"] == both[1]["usage"]
    assert both[0]["answers"][0]["probability"] == pytest.approx(both[1]["answers"][0]["probability"], abs=1e-4)
    assert "no call before it has the call_id 'c1'" in served.refused(422, "/v1/decisions", body(SPAM, given=[output]))


def test_requests_share_batches(served):
    """Held back, then let go: many texts with one question are one batch, and each has the answer that it has alone."""
    alone = [served.post("/v1/decisions", body(TEAM, given=row))["answers"] for row in ROWS[:8]]
    before = metric(served, "batch_rows_count", 'task="decision"')
    with ThreadPoolExecutor(8) as pool, served.held():
        asked = [pool.submit(served.post, "/v1/decisions", body(TEAM, given=row)) for row in ROWS[:8]]
        wait_for(lambda: served.waiting() == 8)
    for future, wanted in zip(asked, alone, strict=True):
        (answer,), (single,) = future.result()["answers"], wanted
        shares = [one["probability"] for one in answer["probabilities"]]
        assert shares == pytest.approx([one["probability"] for one in single["probabilities"]], abs=1e-4)
    assert metric(served, "batch_rows_count", 'task="decision"') - before < 8


def test_batch_calibration_estimates_from_what_was_asked(served, runs):
    question = {**TEAM, "instructions": "Which of the teams?"}
    texts = [f"{row} no. {number}" for number, row in enumerate(ROWS[:20])]
    answers = [served.ask("POST", "/v1/decisions", body(question, given=text, calibration="batch")) for text in texts]
    methods = [headers["x-decision-calibration"] for _, _, headers in answers]
    assert methods == ["prior"] * 15 + ["batch"] * 5
    task = choice(question["instructions"], TEAMS, [""] * 3).task()
    classifier = Classifier.load(ModelSource(str(runs / "creditmix_sft")), CREDITMIX)
    raw = naive_scores(classifier.ranker.model, classifier.ranker.tokenizer, task, texts)
    wanted = batch_calibration(raw, task.labels).apply(raw[-1:]).probabilities[0]
    shares = [one["probability"] for one in answers[-1][1]["answers"][0]["probabilities"]]
    assert shares == pytest.approx(wanted, abs=1e-4)
    none = served.post("/v1/decisions", body(question, given=texts[0], calibration="none"))["answers"][0]
    plain = Calibration(task.labels).apply(raw[:1]).probabilities[0]
    assert [one["probability"] for one in none["probabilities"]] == pytest.approx(plain, abs=1e-4)


IMAGE = {"type": "input_image", "image_url": "https://example.org/a.png"}


@pytest.mark.parametrize(
    ("request_body", "sentence"),
    [
        (body(), "questions: List should have at least 1 item"),
        (body(SPAM, given="  "), "the input is empty"),
        (body(SPAM, model="gpt-6-luna/x"), "not the name of a run"),
        (body(SPAM, given=[{"role": "user", "content": [IMAGE]}]), "read no images"),
        (body({**SPAM, "instructions": [IMAGE]}), "read no images"),
        (body({**SPAM, "type": "guess"}), "questions.0"),
        (body({**TEAM, "choices": [{"value": "a"}]}), "at least 2 items"),
        (body({**TEAM, "choices": [{"value": "a"}, {"value": " a"}]}), "needs a text of its own; 'a' stands"),
        (body({**TEAM, "choices": [{"value": True}, {"value": "true"}]}), "'true' stands there twice"),
        (body({**TEAM, "choices": [{"value": 3}, {"value": "b"}]}), "questions.0"),
        (body(*[SPAM] * 300, given="x" * 20_000), "more than 4,000,000 characters"),
        (body(SPAM, given="7 " * 3000), "does not fit the model's context"),
        (body(SPAM, given=[{"role": "user"}]), "a message needs content"),
        (body(SPAM, calibration="fitted"), "calibration"),
    ],
)  # fmt: skip
def test_what_is_refused(served, request_body, sentence):
    assert sentence in served.refused(422, "/v1/decisions", request_body)


def test_what_system_one_refuses(served):
    ask = {"model": "base", "state": "x", "questions": {"q": {"type": "noul"}}}
    assert "read no images" in served.refused(422, "/v1/systemone", {**ask, "assets": {"a": {"data_base64": ""}}})
    assert "questions.q" in served.refused(422, "/v1/systemone", {**ask, "questions": {"q": {"type": "choice"}}})
    twice = {"q": {"type": "score", "criteria": ["a", "a"]}}
    assert "every option needs" in served.refused(422, "/v1/systemone", {**ask, "questions": twice})
    assert "there is no run" in served.refused(404, "/v1/systemone", {**ask, "model": "nobody"})


def test_what_python_takes_for_json_and_is_none(served):
    """Half a character comes back as a question mark; a number that JSON has not is refused."""
    levels = {"type": "score", "criteria": [{"a": "\ud800"}, "b"]}
    ask = {"model": "base", "state": "x", "questions": {"q\ud800": levels}}
    answers = served.ask("POST", "/v1/systemone", ask)[1]["answers"]
    assert answers["q?"]["legend"] == {"0": {"a": "?"}, "1": "b"}
    named = served.ask("POST", "/v1/decisions", body(SPAM | {"name": "\ud800"}))[1]["answers"]
    assert named[0]["name"] == "?"
    unheard = {"q": levels | {"criteria": [{"a": float("nan")}, "b"]}}
    assert "no NaN" in served.refused(422, "/v1/systemone", ask | {"questions": unheard})


def test_the_client_sees_the_sentence(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="no run 'gpt-6-luna'"):
        client.decisions.create(model="gpt-6-luna", input="x", questions=[SPAM])
    with pytest.raises(openai.UnprocessableEntityError, match="read no images"):
        client.decisions.create(model="sft", input=[{"role": "user", "content": [IMAGE]}], questions=[SPAM])


def test_a_key_and_the_audit_log(runs, tmp_path):
    log = tmp_path / "audit.jsonl"
    with serve(runs, api_key="secret", audit_log=str(log)) as served:
        assert served.ask("POST", "/v1/decisions", body(OWN))[0] == 401
        assert served.ask("POST", "/v1/systemone", {})[0] == 401
        status, _, _ = served.ask("POST", "/v1/decisions", body(OWN, SPAM), {"Authorization": "Bearer secret"})
        assert status == 200
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["task"], line["type"], line["calibration"], line["abstained"]) for line in lines] == [
        ("decision", "choice", "none", False), ("decision", "predicate", "prior", False)]  # fmt: skip
    assert set(lines[0]["probabilities"]) == set(CREDITMIX.labels)
    assert "input" not in lines[0]
