import io

import pytest
from rich.console import Console

from hfprune.report.tables import (
    as_markdown,
    comparison_rows,
    comparison_table,
    latency_conditions,
    short_paths,
    sparsity_table,
    steps_rows,
    steps_table,
)


def report():
    return {
        "dense": {
            "metric": {"eval_loss": 0.1, "eval_accuracy": 0.9722, "eval_runtime": 3.0},
            "params": 1000,
            "nonzero": 990,
            "bytes": 4000,
            "macs": 7_300_000,
            "latency_ms": {"1": 2.0, "32": 9.8},
            "memory_bytes": None,
        },
        "pruned": {
            "metric": {"loss": 0.15, "accuracy": 0.9583},
            "params": 1000,
            "nonzero": 198,
            "bytes": 4000,
            "macs": 7_300_000,
            "latency_ms": {"1": 2.06, "32": 9.8},
            "memory_bytes": None,
        },
        "steps": [
            {
                "target": 0.6,
                "achieved": 0.6,
                "metric_before": {"accuracy": 0.3},
                "metric": {"accuracy": 0.967},
                "epochs": 7.0,
                "seconds": 12.34,
            },
            {"target": 0.8, "achieved": 0.8, "metric_before": None, "metric": {"accuracy": 0.9583}, "epochs": None},
        ],
        "sparsity": {
            "small.weight": {"zeros": 1, "numel": 4, "pattern": "2:4"},
            "first.weight": {"zeros": 80, "numel": 100, "pattern": "unstructured"},
            "last.weight": {"zeros": 20, "numel": 200, "pattern": "unstructured"},
        },
        "main_metric": "eval_accuracy",
        "environment": {"machine": "2 CPU cores (x86_64)", "device": "cpu", "dtype": "float32", "threads": 2},
    }


def shown(table):
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def rows(report):
    return {row[0]: row[1:] for row in comparison_rows(report).rows}


def test_each_quantity_is_compared_in_its_own_way():
    found = rows(report())
    assert list(found)[:2] == ["accuracy", "loss"]
    assert found["accuracy"] == ("97.22 %", "95.83 %", "-1.39 points")
    assert found["loss"] == ("0.1", "0.15", "1.50x")
    assert found["non-zero parameters"] == ("990", "198", "0.20x")
    assert found["checkpoint tensors"] == ("4.00 kB", "4.00 kB", "1.00x")
    assert found["MACs, one example"] == ("7.30 M", "7.30 M", "1.00x")
    assert found["latency, batch 1"] == ("2.00 ms", "2.06 ms", "1.03x")


def test_what_was_not_measured_has_no_row():
    bare = report()
    for side in ("dense", "pruned"):
        bare[side].update(macs=None, latency_ms={}, metric={"accuracy": float("nan"), "runtime": 1.0})
    assert list(rows(bare)) == ["parameters", "non-zero parameters", "checkpoint tensors"]
    assert latency_conditions(bare) is None
    assert rows({}) == {}


def test_a_value_known_on_one_side_only_has_no_change():
    half = report()
    half["dense"]["latency_ms"] = {"1": 2.0}
    half["dense"]["metric"] = {}
    assert rows(half)["latency, batch 32"] == ("–", "9.80 ms", "–")
    assert rows(half)["accuracy"] == ("–", "95.83 %", "–")


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("perplexity", 27.66, 36.9, ("27.66", "36.9", "1.33x")),
        ("matthews_correlation", -0.1, 0.2, ("-0.1", "0.2", "+0.3")),
        ("f1", 0.5, 0.25, ("50.00 %", "25.00 %", "-25.00 points")),
        ("f1", 88.5, 87.7, ("88.5", "87.7", "0.99x")),
        ("perplexity", 20.0, 123456.7, ("20", "123,457", "6172.84x")),
    ],
)
def test_metrics_are_shown_by_what_they_are(name, old, new, expected):
    found = rows({"dense": {"metric": {name: old}}, "pruned": {"metric": {name: new}}})
    assert list(found.values()) == [expected]


def test_batch_sizes_come_in_order_of_size_and_memory_where_measured():
    many = report()
    many["pruned"]["latency_ms"] = {"128": 1.0, "8": 1.0}
    many["dense"]["memory_bytes"] = many["pruned"]["memory_bytes"] = {"8": 3_000_000}
    labels = list(rows(many))
    batches = [label.rpartition(" ")[2] for label in labels if label.startswith("latency")]
    assert batches == ["1", "8", "32", "128"]
    assert rows(many)["peak memory, batch 8"] == ("3.00 MB", "3.00 MB", "1.00x")


def test_the_terminal_table_names_machine_and_dtype():
    text = shown(comparison_table(report()))
    assert "-1.39 points" in text and "2 CPU cores (x86_64), 2 threads, float32" in " ".join(text.split())
    gpu = report()
    gpu["environment"]["device"] = "NVIDIA A100"
    assert latency_conditions(gpu).endswith("on NVIDIA A100, float32.")


def test_steps_show_the_metric_before_and_after_fine_tuning():
    text = shown(steps_table(report()))
    assert all(word in text for word in ("60.00 %", "30.00 %", "96.70 %", "12.3", "accuracy, fine-tuned"))
    assert text.count("–") == 3


def test_sparsity_keeps_the_models_order_and_sums_up_the_rest():
    text = shown(sparsity_table(report(), most=2))
    assert text.index("first.weight") < text.index("last.weight") < text.index("1 smaller") < text.index("all of these")
    assert "small.weight" not in text and "33.22 %" in text
    assert "small.weight" in shown(sparsity_table(report()))


def test_markdown_has_the_same_cells_and_escapes_bars():
    text = as_markdown(comparison_rows(report()))
    assert text.splitlines()[:2] == ["|  | dense | pruned | change |", "|:--|--:|--:|--:|"]
    assert "| accuracy | 97.22 % | 95.83 % | -1.39 points |" in text
    assert "a\\|b" in as_markdown(comparison_rows({"pruned": {"metric": {"a|b": 1.0}}}))


def test_blocks_are_named_without_what_all_begin_with():
    assert short_paths(["timm_model.layer1.0", "timm_model.layer1.1", "timm_model.layer4.0"]) == [
        "layer1.0", "layer1.1", "layer4.0",
    ]  # fmt: skip
    assert short_paths(["vit.encoder.layer.0", "vit.encoder.layer.1"]) == ["layer.0", "layer.1"]
    assert short_paths(["a.b.c.0"]) == ["c.0"]
    assert short_paths(["", ""]) == ["", ""] and short_paths([]) == []
    steps = [{"block": f"timm_model.layer1.{n}", "target": 0.1, "fine_tuned": False} for n in range(2)]
    assert [row[0] for row in steps_rows({"steps": steps}).rows] == ["1 layer1.0", "2 layer1.1"]
