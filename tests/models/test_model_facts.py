"""docs/models.md says of families what the code finds, and `python -m docs.models` says it of any base."""

from __future__ import annotations

import pytest
from support import model_facts
from support.inputs import ROOT

from common.models import tokenizers
from docs import models

PAGE = (ROOT / "docs" / "models.md").read_text()


@pytest.mark.parametrize("part", [model_facts.templates, model_facts.architectures])
def test_the_pages_tables_are_those_of_the_code(part):
    assert part() in PAGE, "print them with PYTHONPATH=.:tests python -m support.model_facts, put them there"


def test_the_facts_of_a_base(tiny_base, capsys):
    models.main([tiny_base])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == f"| | {tiny_base} |"
    facts = dict(line.strip("| ").split(" | ") for line in lines)
    assert facts["architecture"] == "`qwen2`" and facts["parameters"].endswith(" million")
    assert facts["before an answer"] == r"`<|im_end|>\n<|im_start|>assistant\n`".replace("|", r"\|")
    assert (facts["end of the turn"], facts["PAD"]) == (r"`<\|im_end\|>`", r"`<\|endoftext\|>`")
    assert facts["thinking"] == "none"
    assert facts["LoRA is put on"].startswith("`q_proj`, `k_proj`, `v_proj`, `o_proj`")
    assert all(f"{label} " in facts["tokens of CreditMix's labels"] for label in ("Good", "Standard", "Bad"))


def test_the_facts_of_a_base_without_a_chat_template(tiny_base):
    tokenizer = tokenizers.load_tokenizer(tiny_base)
    tokenizer.chat_template = None
    assert models.facts_of_template(tokenizer)["before an answer"] == r"`\n`"
