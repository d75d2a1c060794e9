"""What large models are distilled with, on small ones: the losses that they have without, live and from a cache."""

from __future__ import annotations

import pytest
from support.distillation import distill, loss_column

from common.models import loading
from common.training import prefix_tree

pytestmark = pytest.mark.processes

TERMS = ("--forward_kl", 1, "--ce", 0.5, "--teacher_ce", 0.2, "--hidden_mse", 0.1, "--layer_map", "uniform")


@pytest.fixture
def trees(monkeypatch) -> list[int]:
    """Every model counts as large and no CPU has bfloat16; the list gets the tokens of each tree that is made."""
    monkeypatch.setattr(loading, "LARGE", 0)
    monkeypatch.setattr(loading, "has_bfloat16", lambda: False)
    made, of = [], prefix_tree.PrefixTree.of

    def noted(rows):
        tree = of(rows)
        made.append(len(tree.ids))
        return tree

    monkeypatch.setattr(prefix_tree.PrefixTree, "of", noted)
    return made


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_a_run_is_the_same(cached, base, teacher, uneven, tmp_path, request):
    def run(name: str):
        cache = ("--teacher_cache", tmp_path / f"{name}_cache", "--cache_k", 64) if cached else ()
        return distill(base, tmp_path / name, "--teacher", teacher, "--data", uneven, *TERMS, *cache)

    plain = run("plain")
    trees = request.getfixturevalue("trees")
    quick = run("quick")
    assert len(trees) >= 6
    for name in ("loss", "forward_kl", "ce", "teacher_ce", "hidden_mse"):
        assert loss_column(quick, name) == pytest.approx(loss_column(plain, name), abs=1e-3 if cached else 2e-4), name


@pytest.mark.parametrize(
    ("batch", "cached"), [(4, True), (4, False), (1, False)], ids=["cached", "live", "single rows"]
)
def test_rows_held_out_are_judged_as_ever(batch, cached, base, teacher, uneven, tmp_path, request):
    def judged(name: str) -> list[float]:
        more = ["--teacher", teacher, "--data", uneven, "--eval_data", uneven, "--epochs", 2, "--max_steps", -1]
        cache = ["--teacher_cache", tmp_path / f"{name}_cache", "--cache_k", 64] if cached else []
        more += ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", 4 // batch]
        return loss_column(distill(base, tmp_path / name, *more, *cache), "eval_loss")

    plain = judged("plain")
    request.getfixturevalue("trees")
    assert len(plain) == 2
    assert judged("quick") == pytest.approx(plain, abs=1e-3)


def test_attention_maps_are_compared_as_ever(base, teacher, uneven, tmp_path, request):
    more = ("--teacher", teacher, "--data", uneven, "--attention_mse", 1, "--ce", 1, "--max_steps", 2)
    plain = distill(base, tmp_path / "plain", *more)
    trees = request.getfixturevalue("trees")
    quick = distill(base, tmp_path / "quick", *more)
    assert not trees
    assert loss_column(quick) == pytest.approx(loss_column(plain), abs=1e-5)
