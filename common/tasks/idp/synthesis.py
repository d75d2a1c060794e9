"""Made-up invoices with their fields, for the offline demo.

Vendors and layouts are split like documents are: a held-out invoice has a vendor that no training invoice has, and
about half of them a layout (a combination of header, item lines, total, date style) that none has.
"""

from __future__ import annotations

import datetime
import random
from itertools import product

from common.data import splits
from common.tasks.idp.documents import group_of

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Invoice",
    "type": "object",
    "properties": {
        "invoice_number": {"type": "string"},
        "invoice_date": {"type": "string", "format": "date"},
        "vendor_name": {"type": "string"},
        "total_amount": {"type": "number"},
        "currency": {"type": "string", "pattern": "^[A-Z]{3}$"},
        "line_items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "description": {"type": "string"},
                    "qty": {"type": "number"},
                    "unit_price": {"type": "number"},
                    "amount": {"type": "number"},
                },
                "required": ["description", "qty", "unit_price", "amount"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["invoice_number", "invoice_date", "vendor_name", "total_amount", "currency", "line_items"],
    "additionalProperties": False,
}

HEADERS = (
    "INVOICE {number}\n{vendor}\nDate: {date}",
    "{vendor}\nInvoice No: {number}\nInvoice date: {date}",
    "TAX INVOICE\nSeller: {vendor}\nRef: {number}\nIssued {date}",
    "Bill {number}\nFrom: {vendor}\nDate of issue {date}",
    "{date}\n{vendor}\nInvoice # {number}",
    "Invoice #{number} dated {date} from {vendor}.",
)
ITEMS = (  # a layout's part follows from its text as it stands here, names in braces included: another name, other rows
    "{description} x{qty} @ {price} = {amount}",
    "{qty} x {description} {price} {amount}",
    "{place}) {description} | {qty} | {price} | {amount}",
    "{description}, {qty} pcs at {price}: {amount}",
)
TOTALS = ("Total: {money}", "TOTAL DUE {money}", "Amount payable: {money}", "Grand total {money}")
MONEY = ("{code} {total}", "{total} {code}", "{symbol}{total}")
DATES = ("%Y-%m-%d", "%d %b %Y", "%B %d, %Y", "%d.%m.%Y", "%m/%d/%Y")
LAYOUTS = tuple(product(HEADERS, ITEMS, TOTALS, DATES))
SENTENCE = "Invoice #{number} date {date} from {vendor} total {code} {total}."
CURRENCIES = {"USD": "$", "EUR": "€", "GBP": "£", "INR": "₹"}
NUMBERS = ("INV-{n}", "INV{n}", "{y}-{n}", "F{n}/{y}", "{a}-{n}", "{n}", "{a}{n}-{b}")
SYLLABLES = ("al", "ba", "cor", "den", "el", "fo", "gra", "hu", "in", "jo", "kel", "lu", "mor", "ni", "or", "pra", "ro")
SYLLABLES += ("sta", "ter", "ul", "vex", "wen", "yar", "zo", "bri", "cha", "dro", "fin", "gle", "han", "qui")
TRADES = ("Foods", "Labs", "Logistics", "Office Supplies", "Paper", "Print", "Software", "Systems", "Tools", "Trading")
FORMS = ("Ltd.", "LLC", "Inc.", "GmbH", "AG", "Co.", "Pte Ltd", "& Sons", "B.V.")
KINDS = ("Black", "Blue", "Compact", "Heavy", "Large", "Metal", "Premium", "Red", "Small", "Steel", "White", "Wooden")
GOODS = ("Cable", "Chair", "Charger", "Coffee Beans", "Desk Lamp", "Drill", "Folder", "Gloves", "Keyboard", "Monitor")
GOODS += ("Notebook", "Paint", "Paper A4", "Pen Set", "Printer Ink", "Router", "Shelf", "Tape", "Tea", "Toolbox")
HELD_OUT_SHARE = splits.VALIDATION_SHARE + splits.DEV_SHARE


def synthesize(count: int, seed: int) -> list[dict]:
    """`count` rows {"document", "fields"}; the same count and seed give the same rows.

    An invoice is drawn again until the part that its text belongs to (a hash, see `splits`) is the one it was made
    for, so that vendors and layouts are held out too.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        held_out = rng.random() < HELD_OUT_SHARE
        while True:
            row = _invoice(rng, held_out)
            if _held_out(row["document"]) == held_out:
                break
        rows.append(row)
    return rows


def _held_out(text: str) -> bool:
    return splits.part_of(group_of(text)) != "train"


def _vendor(rng: random.Random, held_out: bool) -> str:
    while True:
        name = "".join(rng.choices(SYLLABLES, k=rng.choice((2, 3)))).capitalize()
        vendor = f"{name} {rng.choice(TRADES)} {rng.choice(FORMS)}"
        if _held_out(vendor) == held_out:
            return vendor


def _layout(rng: random.Random, held_out: bool) -> tuple[str, ...]:
    unseen = held_out and rng.random() < 0.5
    while True:
        layout = rng.choice(LAYOUTS)
        if _held_out("\n".join(layout)) == unseen:
            return layout


def _number(rng: random.Random) -> str:
    letters = "".join(rng.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=2))
    facts = {"n": rng.randint(10, 99999), "y": rng.randint(2019, 2026), "a": letters, "b": rng.randint(1, 99)}
    return rng.choice(NUMBERS).format(**facts)


def _invoice(rng: random.Random, held_out: bool) -> dict:
    header, item_line, total_line, date_style = _layout(rng, held_out)
    vendor, number = _vendor(rng, held_out), _number(rng)
    day = datetime.date(2019, 1, 1) + datetime.timedelta(days=rng.randrange(8 * 365))
    code = rng.choice(list(CURRENCIES))
    cents = [rng.randint(50, 9_999) for _ in range(rng.choices((1, 2, 3), (4, 4, 1))[0])]
    items = [
        {
            "description": f"{rng.choice(KINDS)} {rng.choice(GOODS)}",
            "qty": (qty := rng.randint(1, 9)),
            "unit_price": price / 100,
            "amount": qty * price / 100,
        }
        for price in cents
    ]
    sentence = rng.random() < 0.05
    if sentence:
        items, header = [], SENTENCE
    total = sum(round(100 * item["amount"]) for item in items) or rng.randint(500, 99_999)
    tax = rng.choice((0, 0, 0, 5, 20)) * total // 100 if items else 0
    facts = {"number": number, "vendor": vendor, "date": day.strftime(date_style)}
    facts |= {"code": code, "symbol": CURRENCIES[code], "total": f"{(total + tax) / 100:.2f}"}
    lines = [header.format(**facts)]
    if not sentence:
        if rng.random() < 0.4:
            lines.append(f"Bill to: {_vendor(rng, held_out)}")
        if rng.random() < 0.3:
            due = day + datetime.timedelta(days=rng.choice((14, 30, 60)))
            lines.append(f"Due: {due.strftime(date_style)}")
        for index, item in enumerate(items, start=1):
            money = {"price": f"{item['unit_price']:.2f}", "amount": f"{item['amount']:.2f}"}
            lines.append(item_line.format(place=index, description=item["description"], qty=item["qty"], **money))
        if tax:
            lines += [f"Subtotal {total / 100:.2f}", f"Tax {tax / 100:.2f}"]
        lines.append(total_line.format(money=rng.choice(MONEY).format(**facts)))
    fields = {
        "invoice_number": number,
        "invoice_date": day.isoformat(),
        "vendor_name": vendor,
        "total_amount": (total + tax) / 100,
        "currency": code,
        "line_items": items,
    }
    return {"document": "\n".join(lines), "fields": fields}
