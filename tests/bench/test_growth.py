"""The slopes of curves that are known: what is fitted to them, and what is flagged as not expected."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
from harness import growth_curves, memory
from harness.growth_curves import Curve, Expected, Series

from bench import growth
from common import cli
from common.cli import UserError
from common.files import write_json

pytestmark = pytest.mark.processes

XS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def series(cost, form: str, unit: str = "s", **expected) -> Series:
    """Three rounds of `cost(x)`: as it is, a tenth less and a tenth more."""
    points = {x: [cost(x), 0.9 * cost(x), 1.1 * cost(x)] for x in XS}
    return Series("time", unit, points, Expected(form, "so it is", **expected))


def test_a_line_gives_its_marginal_and_fixed_cost():
    fit = series(lambda x: 3 * x + 20, "linear").fit()
    assert (fit.marginal, fit.fixed, fit.miss) == pytest.approx((3, 20, 0))
    assert fit.marginals == pytest.approx((2.7, 3.3))
    assert 0.3 < fit.exponent < 0.6  # the fixed part bends it


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_a_power_gives_its_exponent(power):
    fit = series(lambda x: 7 * x**power, "linear").fit()
    assert (fit.exponent, *fit.exponents) == pytest.approx((power, power, power))


def test_the_range_of_the_exponent_is_that_of_the_rounds():
    points = {x: [x, x**1.5, x**2] for x in XS}
    fit = Series("time", "s", points, Expected("linear", "")).fit()
    assert (fit.exponent, *fit.exponents) == pytest.approx((1.5, 1, 2))


def test_a_parabola_gives_its_square_share():
    fit = series(lambda x: 5 + 2 * x + x**2 / 8, "quadratic").fit()
    assert (fit.marginal, fit.fixed, fit.miss) == pytest.approx((2, 5, 0))
    assert fit.square == pytest.approx(128 / (5 + 64 + 128))


def test_what_levels_off_gives_its_limit():
    found = series(lambda x: 1000 * x / (4 + x), "saturating", "rows/s")
    assert 1 / found.fit().marginal == pytest.approx(1000)
    assert found.fit().fixed / found.fit().marginal == pytest.approx(4)
    (_, _, row) = growth_curves.markdown([Curve("c", "clients", "a client", [found])]).splitlines()
    assert "| levels off at 1,000 rows/s |  | 0% | saturating: so it is | yes |" in row


def test_points_that_leave_the_fitted_curve_are_not_as_expected():
    """Throughput that levels off, held against a power: it rises by less and less, and is no power."""
    found = series(COSTS["saturating"], "sublinear").disagreement()
    assert found.startswith("is ") and "off a power" in found


def test_a_form_may_hold_from_a_point_on():
    found = series(lambda x: min(x, 8.0), "constant", since=8)
    assert (found.fit().exponent, found.disagreement()) == (pytest.approx(0), "")
    assert series(lambda x: min(x, 8.0), "constant").disagreement() == "changes by a factor of 8.00"


COSTS = {
    "constant": lambda x: 9 + x / 100,
    "linear": lambda x: 9 + 4 * x,
    "quadratic": lambda x: 9 + 4 * x + x**2,
    "sublinear": lambda x: 9 * x**0.5,
    "saturating": lambda x: 900 * x / (4 + x),
}


# a line with a fixed part rises by less and less, too, on logarithmic axes
PAIRS = [pair for pair in product(COSTS, COSTS) if pair != ("sublinear", "linear")]


@pytest.mark.parametrize(("form", "found"), PAIRS)
def test_what_is_not_expected_is_flagged(form, found):
    assert bool(series(COSTS[found], form).disagreement()) == (form != found)


@pytest.mark.parametrize(("cost", "flagged"), [(100, ""), (166, "one more costs 1.66 times what was expected (100 B)")])
def test_a_marginal_cost_is_held_to_what_is_expected(cost, flagged):
    server = series(lambda x: 5e8 + cost * x, "linear", "bytes", marginal=100)
    assert server.disagreement() == flagged


def test_the_table_and_the_plot_show_both_and_flag_one():
    curve = Curve(
        "labels", "labels ranked", "a label",
        [series(COSTS["linear"], "linear"), series(COSTS["linear"], "constant", "bytes")],
    )  # fmt: skip
    _, _, good, bad = growth_curves.markdown([curve]).splitlines()
    assert good.startswith("| labels ranked, 1 to 32 | time | x^0.") and good.endswith("| linear: so it is | yes |")
    assert "4 s a label (3.6 s to 4.4 s)" in good
    assert bad.endswith("| constant: so it is | **no**: changes by a factor of 10.54 |")
    assert growth_curves.draw(curve).startswith(b"\x89PNG")
    assert [each["disagrees"] for each in curve.result()["series"]] == [None, "changes by a factor of 10.54"]


def test_what_was_measured_is_drawn_and_judged_anew(tmp_path, capsys):
    both = [series(COSTS["saturating"], "sublinear", "rows/s"), series(COSTS["linear"], "linear", since=4)]
    curve = Curve("clients", "clients", "a client", both)
    write_json(tmp_path / "clients.json", curve.kept())
    assert growth.main(["--kept", "--outdir", str(tmp_path)]) == cli.DONE
    assert capsys.readouterr().out == growth_curves.markdown([curve]) + "\n"
    assert (tmp_path / "clients.png").read_bytes() == growth_curves.draw(curve)
    with pytest.raises(UserError, match="has no curve"):
        growth.main(["--kept", "--outdir", str(tmp_path / "none")])
    with pytest.raises(UserError, match="give --model_dir and --data to measure"):
        growth.main(["--outdir", str(tmp_path)])
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(UserError, match=r"rows\.json is no curve"):
        growth.main(["--kept", "--outdir", str(tmp_path)])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.01234, "s", "12.3 ms"), (1.5e-5, "s", "15 µs"), (472_320, "bytes", "472 KB"), (-2e6, "bytes", "-2 MB"),
     (1234, "answers/s", "1,234 answers/s"), (3e-10, "bytes", "0")],
)  # fmt: skip
def test_amounts_have_a_fitting_unit(value, unit, text):
    assert growth_curves.amount(value, unit) == text


def test_the_memory_of_a_process_counts_its_children():
    held = 64 << 20
    child = f"held = bytes(range(256)) * {held >> 8}; print(flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        found = memory.own_bytes(parent.pid)
        parent.communicate(b"\n")
    assert held < found < held + (64 << 20)
    assert parent.returncode == 0
    assert memory.own_bytes(os.getpid()) > 0


def test_the_peak_of_tensors_is_of_those_that_live_at_once():
    import torch

    def work():
        for _ in range(3):
            kept = torch.zeros(1_000_000)
            del kept
        return torch.zeros(500_000) + torch.ones(500_000)

    assert memory.tracked_peak(work) == pytest.approx(6_000_000, rel=0.01)
