"""CreditMix rows: how values are cleaned, which rows are of one customer, and the synthetic ones."""

from __future__ import annotations

import csv
import random
from collections import Counter

import pytest
from support.creditmix_sources import (
    FORMATS,
    LINE,
    REAL,
    as_csv,
    csv_text,
    customer,
    customers,
    prepare,
    read,
    write_source,
)

import creditmix_prepare
from common import cli
from common.cli import UserError
from common.data import splits
from common.files import read_json
from common.tasks.ranking import creditmix

needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the public CreditMix data is not beside the checkout")


# ---------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("key", "dirty", "clean"),
    [
        ("Credit Utilization Ratio", "35.03040185583525", "35.03"),
        ("Annual Income", "18246.25_", "18246.25"),
        ("Annual Income", "108488.61000000002", "108488.61"),
        ("Annual Income", "10622.485_", "10622.49"),
        ("Annual Income", "24137255.0", "N/A"),
        ("Outstanding Debt", "809.98", "809.98"),
        ("Outstanding Debt", "809.90", "809.9"),
        ("Age", "23.0", "23"),
        ("Age", "24_", "24"),
        ("Age", "14", "14"),
        ("Age", "13", "N/A"),
        ("Age", "100", "100"),
        ("Age", "101", "N/A"),
        ("Age", "-500", "N/A"),
        ("Age", "8697", "N/A"),
        ("Occupation", "_______", "N/A"),
        ("Occupation", "Media_Manager", "Media_Manager"),
        ("Limit Change", "_", "N/A"),
        ("Limit Change", "-6.49", "-6.5"),
        ("Payment Behaviour", "!@9#%8", "N/A"),
        ("Payment Behaviour", "Low_spent_Small_value_payments", "Low_spent_Small_value_payments"),
        ("SSN", "#F%$D@*&8", "N/A"),
        ("Anything", "", "N/A"),
        ("Anything", "NA", "N/A"),
        ("Anything", "nan", "N/A"),
        ("Anything", "N/A", "N/A"),
        ("Anything", "-0.001", "0"),
        ("Anything", "1e3", "1000"),
        ("Anything", "1_000", "1_000"),
        ("Anything", "12 Main Street", "12 Main Street"),
        ("Balance", "__-333333333333333333333333333__", "N/A"),
        ("Invested", "__10000__", "N/A"),
        ("Invested", "236.64268203272135", "237"),
        ("Accounts", "-1", "N/A"),
        ("Cards", "1385", "N/A"),
        ("Interest", "5318", "N/A"),
        ("Loans", "-100", "N/A"),
        ("Loans", "4_", "4"),
        ("Inquiries", "2022.0", "N/A"),
        ("Annual Income", "19,114.12", "19114.12"),
        ("Annual Income", "1,14,500", "114500"),
        ("Annual Income", "19 114,12", "19114.12"),
        ("Annual Income", "19'114.12", "19114.12"),
        ("Annual Income", "19.114,12", "19114.12"),
        ("Annual Income", "1.234.567", "N/A"),
        ("Annual Income", "19,114_", "19114"),
        ("Annual Income", "24,137,255", "N/A"),
        ("Balance", "-1,234.56", "-1235"),
        ("Outstanding Debt", "809,98", "809.98"),
        ("Outstanding Debt", "1.234", "1.23"),
        ("Outstanding Debt", "1,23,4", "1,23,4"),
        ("Outstanding Debt", "$ 809.98", "$ 809.98"),
        ("Occupation", "1,234", "1,234"),
        ("Anything", "1,234", "1,234"),
    ],
)
def test_a_value_is_cleaned_once_and_for_all(key, dirty, clean):
    assert creditmix.clean_value(key, dirty) == clean
    assert creditmix.clean_value(key, clean) == clean
    assert creditmix.clean_features(f"{key}: {dirty}, Other: x") == f"{key}: {clean}, Other: x"


def test_amounts_with_separators_leave_a_customer_in_its_group():
    plain, grouped = (f"Age: 23, Outstanding Debt: {debt}, Occupation: Writer" for debt in ("1809.98", "1,809.98"))
    tally: Counter[str] = Counter()
    assert creditmix.clean_features(grouped, tally) == plain
    assert tally == {"Outstanding Debt: thousands separators and decimal comma read": 1}
    assert creditmix.CREDITMIX.group_of({"question": grouped}) == creditmix.CREDITMIX.group_of({"question": plain})


@pytest.mark.parametrize("name", ["x.jsonl", "raw.csv", "raw.parquet"])
def test_an_amount_that_is_not_read_is_named(tmp_path, name, capsys):
    rows = customers(20)
    rows[3]["question"] = rows[3]["question"].replace("Annual Income: ", "Annual Income: EUR ")
    path = write_source(tmp_path / name, rows)
    place = {"x.jsonl": "line 4", "raw.csv": "line 5", "raw.parquet": "row 4"}[name]
    with pytest.raises(UserError, match=f"{place}: Annual Income 'EUR .*' is not a number; give it without currency"):
        creditmix.read_labelled(path)
    assert creditmix.read_labelled(path, skip_bad_rows=True)[1]["rows bad"] == 1


@pytest.mark.parametrize(
    ("line", "clean"),
    [
        (LINE.format("Scientist", "809.98_", "35.0304"), LINE.replace("23.0", "23").format("Scientist", 809.98, 35.03)),
        (
            "Type of Loan: Auto Loan, Credit-Builder Loan, and Home Equity Loan, Age: 23.0",
            "Type of Loan: Auto Loan, Credit-Builder Loan, and Home Equity Loan, Age: 23",
        ),
        ("Age: , Occupation: , Annual Income: ", "Age: N/A, Occupation: N/A, Annual Income: N/A"),
        ("Age: 23.0,Occupation:  Doctor ,\nLoans: 2.0\n", "Age: 23, Occupation: Doctor, Loans: 2"),
    ],
)
def test_a_line_is_split_only_before_a_key(line, clean):
    assert creditmix.clean_features(line) == clean


@pytest.mark.parametrize(
    "text",
    [
        "N/A",
        "Unknown",
        "No information.",
        "",
        "23.0",
        "age 23.0_",
        "Invoice 12: 3.0\nTotal: 3.50_",
        "12:30, 5.0",
        ", A: 1",
    ],
)
def test_text_that_is_no_list_of_pairs_stays(text):
    assert creditmix.clean_features(text) == text


def test_cleaning_a_clean_line_changes_nothing():
    draw = random.Random(0)
    pieces = ["Age", "Cards: ", ": ", ", ", ",", "_", "23.0", "-7.005", " ", "x", "B: ", "\n", "1e20", "N/A", "!@9#%8"]
    for _ in range(5000):
        once = creditmix.clean_features("".join(draw.choices(pieces, k=draw.randint(1, 9))))
        assert creditmix.clean_features(once) == once


def test_csv_cells_become_the_six_and_the_all_line_and_every_rule_is_counted(tmp_path):
    cells = {"Customer_ID": "C1", "Month": "September", "Credit_Mix": "Good"}
    values = ["23", "Scientist", "19114.12_", "809.98", "35.0304", "!@9#%8", "1824.84", "3", "4", "3", "-100", "3"]
    values += [
        "7_",
        "11.27",
        "2022.0",
        "22 Years and 9 Months",
        "No",
        "49.57",
        "__10000__",
        "-333333333333333333333333",
    ]
    first = cells | dict(zip((column.source for column in creditmix.COLUMNS), values, strict=True))
    second = first | {"Month": "October", "Num_of_Loan": "4_", "Num_Credit_Inquiries": "4.0", "Credit_Mix": "_"}
    path = tmp_path / "raw.csv"
    path.write_text(csv_text([first, second]))

    six = "Age: 23, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, "
    six += "Credit Utilization Ratio: 35.03, Payment Behaviour: N/A"
    assert creditmix.read_labelled(path)[0][0]["question"] == six
    rows, counts = creditmix.read_labelled(path, "all")
    assert [row["question"] for row in rows] == [
        f"{six}, Salary: 1825, Accounts: 3, Cards: 4, Interest: 3, Loans: 4, Days Late: 3, Late Payments: 7, "
        "Limit Change: 11.3, Inquiries: 4, History Months: 273, Pays Minimum: No, EMI: 50, Invested: N/A, Balance: N/A"
    ]
    assert creditmix.clean_features(rows[0]["question"]) == rows[0]["question"]
    assert (counts["rows read"], counts["rows kept"], counts["rows unlabelled"]) == (2, 1, 1)
    assert counts["Loans: impossible (below 0 or above 20) to N/A"] == 1
    assert counts["Loans: filled from the customer's other rows"] == 1
    assert counts["Inquiries: filled from the customer's other rows"] == 1
    assert counts["Payment Behaviour: placeholder to N/A"] == 2
    assert counts["Late Payments: stray _ removed"] == 2
    assert not any(rule.startswith("Payment Behaviour: filled") for rule in counts)  # it is another one every month


def test_a_gap_is_filled_with_the_commonest_value_of_the_same_customer_only(tmp_path):
    rows = [{"question": LINE.format(job, 5, 30), "answer": "Bad"} for job in ("a", "b", "b", "_______", "_______")]
    lines = list(csv.DictReader(as_csv(rows).splitlines()))
    for line, owner in zip(lines, ["1", "1", "1", "1", "2"], strict=True):
        line["Customer_ID"] = owner
    (tmp_path / "raw.csv").write_text(csv_text(lines))
    read_back = creditmix.read_labelled(tmp_path / "raw.csv")[0]
    assert [customer(row["question"]) for row in read_back] == ["a", "b", "b", "b", "N/A"]


# ---------------------------------------------------------------- customers


def test_every_format_gives_a_customer_the_same_group(tmp_path):
    rows = customers(40)
    groups = []
    for name in FORMATS:
        read_back, _ = creditmix.read_labelled(write_source(tmp_path / name, rows))
        groups.append([(customer(row["question"]), row["group"]) for row in read_back])
    assert groups[0] == groups[1] == groups[2] == groups[3]
    assert len(set(groups[0])) == len({name for name, _ in groups[0]}) > 30


@pytest.mark.parametrize("name", FORMATS)
def test_no_customer_is_on_both_sides(tmp_path, name):
    prepare(write_source(tmp_path / name, customers()), tmp_path / "out")
    seen = {"train": set(), "dev": set(), "val": set()}
    for row in read(tmp_path / "out", "sft"):
        seen["train"].add(customer(row["input"]))
    for part in ("dev", "val"):
        seen[part] = {customer(row["question"]) for row in read(tmp_path / "out", part)}
    assert all(seen.values())
    assert not seen["train"] & seen["dev"] and not seen["train"] & seen["val"] and not seen["dev"] & seen["val"]


def test_no_synthetic_customer_is_on_both_sides(tmp_path):
    assert cli.run(creditmix_prepare.main, ["--synthesize", "600", "--outdir", str(tmp_path)]) == cli.DONE
    sides = [{row["group"] for row in read(tmp_path, part)} for part in ("sft", "dev", "val")]
    assert all(sides) and len(set.union(*sides)) == sum(map(len, sides))


def test_csv_rows_of_one_customer_or_one_debt_are_one_group(tmp_path):
    table = [("A", 30), ("A", "20_"), ("B", 20), ("C", 40), ("D", "_"), ("D", "_"), ("", "_"), ("", 40)]
    lines = list(csv.DictReader(as_csv([{"question": LINE.format("x", 1, 1), "answer": "Bad"}] * 8).splitlines()))
    for line, (owner, debt) in zip(lines, table, strict=True):
        line |= {"Customer_ID": owner, "Outstanding_Debt": str(debt)}
    (tmp_path / "raw.csv").write_text(csv_text(lines))
    groups = [row["group"] for row in creditmix.read_labelled(tmp_path / "raw.csv")[0]]
    assert groups[0] == groups[1] == groups[2] == creditmix.group_of("Outstanding Debt: 20")  # the smallest of A, B
    assert groups[3] == groups[7] == creditmix.group_of("Age: 7, Outstanding Debt: 40")
    assert groups[4] == groups[5] and len({groups[0], groups[3], groups[4], groups[6]}) == 4


def test_without_a_debt_the_line_is_the_group():
    one, two = creditmix.group_of("Age: 23"), creditmix.group_of("Age: 24")
    assert one != two and one == creditmix.group_of("Age: 23") == splits.group_hash("Age: 23")
    assert creditmix.group_of("Age: 23, Outstanding Debt: 5") == creditmix.group_of("Age: 1, Outstanding Debt: 5")


def test_a_group_that_a_row_brings_is_kept(tmp_path):
    rows = [{"question": "Age: 23.0", "answer": "Bad", "group": "0123456789abcdef"}]
    read_back, _ = creditmix.read_labelled(write_source(tmp_path / "x.jsonl", rows))
    assert read_back == [{"question": "Age: 23", "answer": "Bad", "group": "0123456789abcdef"}]


# ---------------------------------------------------------------- synthetic rows


def test_synthetic_rows_look_like_the_source():
    raw = creditmix.synthesize(9000, seed=1)
    assert len(raw) == 9000 and raw == creditmix.synthesize(9000, seed=1) != creditmix.synthesize(9000, seed=2)
    rows, counts = creditmix.clean_rows(raw, "synthetic rows")
    shares = {label: count / 9000 for label, count in Counter(row["answer"] for row in rows).items()}
    assert shares == pytest.approx({"Standard": 0.45, "Good": 0.31, "Bad": 0.24}, abs=0.03)
    groups = splits.groups_of(rows)
    assert all(len({row["answer"] for row in members}) == 1 for members in groups.values())
    assert 2.8 < len(rows) / len(groups) < 3.2 and max(map(len, groups.values())) <= 4
    assert counts["rows synthetic"] == 9000 and 0.04 < counts["Annual Income: stray _ removed"] / 9000 < 0.1


def test_the_debt_tells_the_synthetic_label_noisily():
    rows, _ = creditmix.clean_rows(creditmix.synthesize(9000, seed=3), "synthetic rows")
    bins: dict[tuple, Counter] = {}
    for row in rows:
        pairs = dict(creditmix.split_features(row["question"]))
        place = int(float(pairs["Outstanding Debt"]) / 250), splits.part_of(row["group"]) == "train"
        bins.setdefault(place, Counter())[row["answer"]] += 1
    right = sum(told[bins[place, True].most_common(1)[0][0]] for (place, train), told in bins.items() if not train)
    share = right / sum(told.total() for (_, train), told in bins.items() if not train)
    assert 0.6 < share < 0.8


def test_synthesizing_writes_its_raw_file_and_says_synthetic(tmp_path, capsys):
    flags = ["--synthesize", "600", "--outdir", str(tmp_path / "a")]
    assert cli.run(creditmix_prepare.main, flags) == cli.DONE
    assert "SYNTHETIC" in capsys.readouterr().out
    manifest = read_json(tmp_path / "a" / "creditmix_manifest.json")
    assert manifest["synthetic"] and manifest["cleaning"]["rows read"] == 600
    again = prepare(tmp_path / "a" / "creditmix_dataset.json", tmp_path / "b")
    assert again["synthetic"]  # the rows themselves say so
    assert {name: told for name, told in manifest["files"].items() if name in again["files"]} == again["files"]
    assert cli.run(creditmix_prepare.main, flags) == cli.DONE  # its own file may be written again


def test_synthetic_rows_never_replace_real_ones(tmp_path, capsys):
    source = write_source(tmp_path / "creditmix_dataset.json", customers(3))
    before = source.read_bytes()
    assert cli.run(creditmix_prepare.main, ["--synthesize", "600", "--outdir", str(tmp_path)]) == cli.BAD_INPUT
    assert "choose another --outdir" in capsys.readouterr().err
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]
