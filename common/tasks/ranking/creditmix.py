"""CreditMix, the built-in label task, and its sources: every accepted format becomes cleaned, labelled rows.

One features line is `Key: value, Key: value`. `clean_features` is the one place where a line is normalised; prepare,
eval, infer and serve all pass through it, so a model never meets a spelling that it was not trained on.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import UserError
from common.data import rows as records
from common.data import splits
from common.tasks.ranking.task import LabelTask

MISSING = "N/A"
UNLABELLED = ("", "_")
DEBT_KEY = "Outstanding Debt"
GROUP_KEY = (
    "outstanding debt with 2 decimals: every customer of the source has one, the same in all rows and formats "
    "(the few customers with equal debts are kept together); in a CSV also Customer_ID; without a debt the whole line"
)
MAX_SYNTHETIC_ROWS = 300_000  # the debts that tell customers apart must not run out


class CreditMix(LabelTask):
    """CreditMix's way to read its rows; see `LabelTask` for the rest."""

    unlabelled = UNLABELLED

    @property
    def group_rule(self) -> str:
        return GROUP_KEY

    @property
    def text_keys(self) -> tuple[str, ...]:
        return ("features", self.text_field)

    def clean(self, text: str, tally: Counter[str] | None = None) -> str:
        """See `clean_features`."""
        return clean_features(text, tally)

    def file_in(self, folder: str | Path, kind: str) -> Path:
        """See `LabelTask.file_in`; the built-in task's have the plain names."""
        return Path(folder) / f"{kind}.json"

    def warning(self, text: str) -> str | None:
        """That no feature of a line was found, or that an amount is not read."""
        pairs = split_features(text)
        if any(key in RULES for key, _ in pairs):
            return amount_fault(pairs)
        return 'no feature of a CreditMix line is in the text; give some, as in "Age: 23.0, Occupation: Scientist"'

    def group_of(self, row: dict) -> str:
        """The group hash of a row's customer; see `group_of`."""
        return group_of(self.text_of(row) or "")

    def read(
        self,
        path: str | Path,
        features: str = "six",
        skip_bad_rows: bool = False,
        text_fault: Callable[[str], str | None] = lambda text: None,
    ) -> tuple[list[dict], dict[str, int]]:
        """See `read_labelled`."""
        return read_labelled(path, features, skip_bad_rows, text_fault)


CREDITMIX = CreditMix(
    name="creditmix",
    labels=("Good", "Standard", "Bad"),
    instruction="Classify the credit mix of this customer as Good, Standard or Bad. Return only the label.",
    null_inputs=(
        "N/A",
        "Unknown",
        "No information.",
        "Age: N/A, Occupation: N/A, Annual Income: N/A, Outstanding Debt: N/A, "
        "Credit Utilization Ratio: N/A, Payment Behaviour: N/A",
        "Age: , Occupation: , Annual Income: , Outstanding Debt: , Credit Utilization Ratio: , Payment Behaviour: ",
    ),
    text_field="question",
    label_field="answer",
    group_key="customer",
)


class FeatureColumn(NamedTuple):
    """A column of the raw CSV and its name and rules in a features line."""

    source: str
    key: str
    low: float = -1e12
    high: float = 1e12
    decimals: int = 2
    monthly: bool = False  # differs from month to month, so the customer's other rows cannot fill it
    words: bool = False  # no number


# The six columns of the question/answer file come first: an `all` line begins with the `six` line. Left out: ID,
# Customer_ID, Name, SSN (they identify), Month (when, not who) and Type_of_Loan, whose text costs a tenth of the line
# while gradient boosting on unseen customers is as good with the number of loans alone (0.940 with and without).
# Names are short and large amounts whole, because a small model reads digit by digit. The limits are wide of every
# plausible customer; beyond them lie slips of the source: thousands of cards, -100 loans, a balance of -3e26, an
# investment of exactly __10000__.
COLUMNS = (
    FeatureColumn("Age", "Age", 14, 100),
    FeatureColumn("Occupation", "Occupation", words=True),
    FeatureColumn("Annual_Income", "Annual Income", 0, 1_000_000),
    FeatureColumn("Outstanding_Debt", DEBT_KEY),
    FeatureColumn("Credit_Utilization_Ratio", "Credit Utilization Ratio", monthly=True),
    FeatureColumn("Payment_Behaviour", "Payment Behaviour", monthly=True, words=True),
    FeatureColumn("Monthly_Inhand_Salary", "Salary", 0, 100_000, 0),
    FeatureColumn("Num_Bank_Accounts", "Accounts", 0, 20),
    FeatureColumn("Num_Credit_Card", "Cards", 0, 20),
    FeatureColumn("Interest_Rate", "Interest", 0, 100),
    FeatureColumn("Num_of_Loan", "Loans", 0, 20),
    FeatureColumn("Delay_from_due_date", "Days Late", -365, 365),
    FeatureColumn("Num_of_Delayed_Payment", "Late Payments", 0, 50),
    FeatureColumn("Changed_Credit_Limit", "Limit Change", -100, 100, 1),
    FeatureColumn("Num_Credit_Inquiries", "Inquiries", 0, 20),
    FeatureColumn("Credit_History_Age", "History Months", 0, 1200),
    FeatureColumn("Payment_of_Min_Amount", "Pays Minimum", words=True),
    FeatureColumn("Total_EMI_per_month", "EMI", 0, 2_500, 0),
    FeatureColumn("Amount_invested_monthly", "Invested", 0, 5_000, 0, monthly=True),
    FeatureColumn("Monthly_Balance", "Balance", -10_000_000, 10_000_000, 0, monthly=True),
)
SIX = COLUMNS[:6]
FEATURES = {"six": SIX, "all": COLUMNS}
SIX_KEYS = frozenset(column.key for column in SIX)
RULES = {column.key: column for column in COLUMNS}
NUMERIC = frozenset(column.key for column in COLUMNS if not column.words)
ANY_COLUMN = FeatureColumn("", "")  # the rules of a key that the CSV does not have

PLACEHOLDERS = frozenset({"", "na", "n/a", "nan", "null", "nm", "!@9#%8", "#f%$d@*&8"})
NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
# Thousands apart, by commas, spaces or apostrophes ("19,114.12", in India "1,14,500", "1 234,5") or by dots with
# another dot or a comma behind ("1.234,50", "1.234.567"); or a decimal comma alone ("809,98"). "1.234" is plain.
GROUPED = re.compile(r"(-?\d{1,3}(?:,\d{2,3})*,\d{3})(?:\.(\d+))?|(-?\d{1,3}(?:[ '’\u00a0\u202f]\d{3})+)(?:[.,](\d+))?")
DOTTED = re.compile(r"(-?\d{1,3}(?:\.\d{3})+),(\d+)|(-?\d{1,3}(?:\.\d{3}){2,})|(-?\d+),(\d+)")
# Values hold commas too ("Auto Loan, and Home Equity Loan"), so a new pair begins only at ", Capitalised Key: ".
PAIR_BREAK = re.compile(r",\s*(?=[A-Z][^,:\n]*:(?:\s|$))")
KEY = re.compile(r"[A-Z][^,:\n]*")
HISTORY = re.compile(r"(\d+) Years? and (\d+) Months?")


def clean_value(key: str, text: str, tally: Counter[str] | None = None) -> str:
    """One cleaned value: a plain number of few decimals, "N/A" for a placeholder or an impossible number, else `text`.

    Args:
        key: the key in the features line; known keys have their own limits and decimals (`COLUMNS`).
        tally: counts what was done, by "key: rule".
    """
    text = text.strip()
    if text == MISSING:
        return text
    bare = text.strip("_").strip()
    rule = None
    if key in NUMERIC and (plain := _ungrouped(bare)):
        bare, rule = plain, "thousands separators and decimal comma read"
    if bare.lower() in PLACEHOLDERS:
        value, rule = MISSING, "placeholder to N/A"
    elif NUMBER.fullmatch(bare):
        column, number = RULES.get(key, ANY_COLUMN), float(bare)
        if column.low <= number <= column.high:
            value = f"{number:.{column.decimals}f}"
            if "." in value:
                value = value.rstrip("0").rstrip(".")
            if value == "-0":
                value = "0"
            if rule is None and bare != text:
                rule = "stray _ removed"
            elif rule is None and value != bare:
                rule = "number shortened"
        else:
            value, rule = MISSING, _impossible(column)
    else:
        value = text
    if rule and tally is not None:
        tally[f"{key}: {rule}"] += 1
    return value


def _ungrouped(text: str) -> str | None:
    """A number with thousands separators or a decimal comma, as a plain one; None for any other text."""
    match = GROUPED.fullmatch(text) or DOTTED.fullmatch(text)
    if not match:
        return None
    whole, *decimals = [part for part in match.groups() if part]
    return ".".join([re.sub(r"[^\d-]", "", whole), *decimals])


def amount_fault(pairs: Iterable[tuple[str, str]]) -> str | None:
    """Why a line's (key, value) pairs, as they are or cleaned, are not read: a number with something else beside it."""
    for key, value in pairs:
        if key in NUMERIC and any(map(str.isdigit, value)):
            cleaned = clean_value(key, value)
            if cleaned != MISSING and not NUMBER.fullmatch(cleaned):
                return f"{key} '{value[:40]}' is not a number; give it without currency and units"
    return None


def _impossible(column: FeatureColumn) -> str:
    return f"impossible (below {column.low:,.0f} or above {column.high:,.0f}) to N/A"


def split_features(line: str) -> list[tuple[str, str]]:
    """The (key, value) pairs of a features line; [] where `line` is no "Key: value, Key: value" list."""
    pairs = []
    for part in PAIR_BREAK.split(line.strip()):
        key, colon, value = part.partition(":")
        if not (colon and KEY.fullmatch(key)) or value[:1].strip() or "\n" in value.strip():
            return []
        pairs.append((key.rstrip(), value.strip()))
    return pairs


def join_features(pairs: Iterable[tuple[str, str]]) -> str:
    """The features line of (key, value) pairs."""
    return ", ".join(f"{key}: {value}" for key, value in pairs)


def clean_features(line: str, tally: Counter[str] | None = None) -> str:
    """`line` with every value cleaned (see `clean_value`); text that is no list of pairs comes back unchanged.

    Cleaning a clean line changes nothing.
    """
    pairs = split_features(line)
    return join_features((key, clean_value(key, value, tally)) for key, value in pairs) if pairs else line


def group_of(line: str) -> str:
    """The group hash of a cleaned features line: its customer's debt, or the line itself where it has none."""
    debt = dict(split_features(line)).get(DEBT_KEY, "")
    return splits.group_hash(_debt_group(float(debt)) if NUMBER.fullmatch(debt) else line)


def _debt_group(debt: float) -> str:
    return f"{DEBT_KEY}: {debt:.2f}"


def read_labelled(
    path: str | Path,
    features: str = "six",
    skip_bad_rows: bool = False,
    text_fault: Callable[[str], str | None] = lambda text: None,
) -> tuple[list[dict], dict[str, int]]:
    """Cleaned labelled rows of a file, and what was done to get them.

    The format is seen from the content: a JSON list or JSONL of {"question", "answer"} (a "group" of an earlier run is
    kept), a CSV with these columns, or the raw credit-score CSV, also gzipped; either also as Parquet.

    Args:
        features: "six" or "all": the columns of the raw CSV that make the line. Question lines stay as they are, but
            asking for "all" where they hold six only is an error.
        skip_bad_rows: go on without bad rows, which are then named and counted, instead of stopping.
        text_fault: a further check of a features line that is not made of the raw CSV: why its row is bad, or None.

    Returns:
        Rows {"question": features line, "answer": label, "group": group hash} in the file's order, and counts: "rows
        read", "rows kept", "rows unlabelled", "rows bad", "rows synthetic", then the values that each cleaning rule
        changed, among all good rows.

    Raises:
        UserError: by file and line, whatever makes the file unusable.
    """
    unit, numbered, header = records.numbered_rows(path)
    if header is not None and not {"question", "answer"} <= set(header):
        return _read_raw_table(path, unit, numbered, header, features, skip_bad_rows)
    label_fault = CREDITMIX.label_fault("answer", UNLABELLED)

    def fault_of(row: dict) -> str | None:
        return (
            label_fault(row)
            or amount_fault(split_features(row["question"]))
            or text_fault(clean_features(row["question"]))
        )

    good = records.check_rows(path, numbered, ("question", "answer"), skip_bad_rows, unit, fault_of).rows
    if features == "all" and all({key for key, _ in split_features(row["question"])} <= SIX_KEYS for row in good):
        raise UserError(f"{path} holds the six features only; --features all needs the raw credit-score CSV")
    return clean_rows(good, path, bad=len(numbered) - len(good))


def clean_rows(raw: Sequence[dict], source: str | Path, bad: int = 0) -> tuple[list[dict], dict[str, int]]:
    """Cleaned labelled rows from good {"question", "answer"} rows, and the counts (see `read_labelled`).

    Args:
        source: their name in an error.
        bad: how many bad rows were left out before.
    """
    tally: Counter[str] = Counter()
    rows = []
    for row in raw:
        line, label = clean_features(row["question"], tally), row["answer"].strip()
        if label not in UNLABELLED:
            rows.append({"question": line, "answer": label, "group": row.get("group") or group_of(line)})
    synthetic = sum(row.get("synthetic") is True for row in raw)
    return rows, _counts(source, len(raw), len(rows), bad, synthetic, tally)


def _counts(source: str | Path, good: int, kept: int, bad: int, synthetic: int, tally: Counter[str]) -> dict[str, int]:
    if not kept:
        raise UserError(f"{source} has no labelled row; give a file with labels")
    return {
        "rows read": good + bad,
        "rows kept": kept,
        "rows unlabelled": good - kept,
        "rows bad": bad,
        "rows synthetic": synthetic,
        **dict(sorted(tally.items())),
    }


def _read_raw_table(
    path: str | Path,
    unit: str,
    numbered: list[tuple[int, Any]],
    header: Sequence[str],
    features: str,
    skip_bad_rows: bool,
) -> tuple[list[dict], dict[str, int]]:
    columns = FEATURES[features]
    missing = [name for name in (*(column.source for column in columns), "Credit_Mix") if name not in header]
    if missing:
        raise UserError(
            f"{path} has neither the columns question and answer nor those of the raw credit-score CSV "
            f"({', '.join(missing[:7])} missing); where its labels are others, describe them with --task FILE.yaml, "
            "which --guess_task FILE.yaml writes from its columns"
        )
    numbered = [(number, _cells(row)) for number, row in numbered]
    label_fault = CREDITMIX.label_fault("Credit_Mix", UNLABELLED)

    def fault_of(row: dict) -> str | None:
        return label_fault(row) or amount_fault((key, _history_months(row[source])) for source, key, *_ in columns)

    raw = records.check_rows(path, numbered, (), skip_bad_rows, unit, fault_of).rows
    tally: Counter[str] = Counter()
    customers = [row.get("Customer_ID", "").strip() for row in raw]
    table = [{key: clean_value(key, _history_months(row[source]), tally) for source, key, *_ in columns} for row in raw]
    _fill_from_customer(table, customers, columns, tally)
    rows = [
        {"question": join_features(values.items()), "answer": row["Credit_Mix"].strip(), "group": group}
        for row, values, group in zip(raw, table, _customer_groups(table, customers), strict=True)
        if row["Credit_Mix"].strip() not in UNLABELLED
    ]
    return rows, _counts(path, len(raw), len(rows), len(numbered) - len(raw), 0, tally)


def _cells(row: Any) -> Any:
    """A row with the texts that CSV would have, where a Parquet file has numbers."""
    return {name: "" if cell is None else str(cell) for name, cell in row.items()} if isinstance(row, dict) else row


def _history_months(text: str) -> str:
    """A credit history such as "22 Years and 9 Months" in months ("273"); any other text as it is."""
    age = HISTORY.fullmatch(text.strip())
    return str(12 * int(age[1]) + int(age[2])) if age else text


def _fill_from_customer(
    table: list[dict[str, str]], customers: Sequence[str], columns: Sequence[FeatureColumn], tally: Counter[str]
) -> None:
    """Fill N/A with the commonest value of the same customer's rows (the earliest of equals); uses no labels."""
    rows_of: dict[str, list[dict[str, str]]] = defaultdict(list)
    for customer, values in zip(customers, table, strict=True):
        if customer:
            rows_of[customer].append(values)
    for members in rows_of.values():
        for key in (column.key for column in columns if not column.monthly):
            gaps = [values for values in members if values[key] == MISSING]
            if gaps and len(gaps) < len(members):
                known = Counter(values[key] for values in members if values[key] != MISSING)
                for values in gaps:
                    values[key] = known.most_common(1)[0][0]
                tally[f"{key}: filled from the customer's other rows"] += len(gaps)


def _customer_groups(table: Sequence[dict[str, str]], customers: Sequence[str]) -> list[str]:
    """The group hash of each row. Rows of one Customer_ID or one debt are one group, named by its smallest debt."""
    parent: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    nodes: list[Any] = []
    for values, customer in zip(table, customers, strict=True):
        debt = values[DEBT_KEY]
        owner = f"Customer_ID: {customer}" if customer else None
        node = float(debt) if NUMBER.fullmatch(debt) else owner or join_features(values.items())
        if owner:
            parent[root(owner)] = root(node)
        nodes.append(node)
    smallest: dict[Any, float] = {}
    for node in nodes:
        if isinstance(node, float):
            smallest[root(node)] = min(node, smallest.get(root(node), node))
    names = {node: _debt_group(smallest[root(node)]) if root(node) in smallest else node for node in set(nodes)}
    return [splits.group_hash(names[node]) for node in nodes]


# class: share, debt (lowest, commonest, highest), median income, mean age, how often little is spent
_SYNTHETIC = {
    "Good": (0.31, (10, 500, 1700), 52_000, 38, 0.40),
    "Standard": (0.45, (100, 1300, 2900), 36_000, 33, 0.50),
    "Bad": (0.24, (1000, 2700, 5000), 22_000, 29, 0.60),
}
_OCCUPATIONS = (
    "Accountant", "Architect", "Developer", "Doctor", "Engineer", "Entrepreneur", "Journalist", "Lawyer",
    "Manager", "Mechanic", "Media_Manager", "Musician", "Scientist", "Teacher", "Writer",
)  # fmt: skip


def synthesize(n: int, seed: int) -> list[dict]:
    """`n` synthetic rows {"question", "answer", "synthetic": true} in the six features and with the source's dirt.

    Nobody's data: invented customers of two to four monthly rows each, whose debt (no two the same), income and age
    depend on the label with wide overlaps. The rows are as noisy as a source, so clean them like one.
    """
    if n > MAX_SYNTHETIC_ROWS:
        raise UserError(f"--synthesize {n} is more than {MAX_SYNTHETIC_ROWS:,} rows; ask for fewer")
    rng = random.Random(seed)
    shares = [share for share, *_ in _SYNTHETIC.values()]
    rows: list[dict] = []
    debts: set[float] = set()
    while len(rows) < n:
        label = rng.choices(list(_SYNTHETIC), shares)[0]
        _, (lowest, commonest, highest), median, mean_age, thrift = _SYNTHETIC[label]
        debt = round(rng.triangular(lowest, highest, commonest), 2)
        if debt in debts:
            continue
        debts.add(debt)
        income = round(min(180_000, max(7_000, median * rng.lognormvariate(0, 0.55))), 2)
        age = round(min(60, max(16, rng.gauss(mean_age, 9))))
        occupation = rng.choice(_OCCUPATIONS)
        for _month in range(rng.choice((2, 3, 3, 4))):
            spent = "Low" if rng.random() < thrift else "High"
            pairs = {
                "Age": f"{age:.1f}",
                "Occupation": occupation,
                "Annual Income": f"{income}{_dirt(rng, 0.07)}",
                "Outstanding Debt": f"{debt}{_dirt(rng, 0.02)}",
                "Credit Utilization Ratio": str(min(50.0, max(20.0, rng.gauss(32.3, 5)))),
                "Payment Behaviour": f"{spent}_spent_{rng.choice(('Small', 'Medium', 'Large'))}_value_payments",
            }
            rows.append({"question": join_features(pairs.items()), "answer": label, "synthetic": True})
    return rows[:n]


def _dirt(rng: random.Random, share: float) -> str:
    return "_" if rng.random() < share else ""
