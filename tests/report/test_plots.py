import pytest
from matplotlib.image import imread

from hfprune.report.plots import sparsity_plot, trajectory_plot


def report(tensors=3, steps=2):
    entry = {"numel": 100, "pattern": "unstructured"}
    step = {"metric_before": {"accuracy": 0.4}, "metric": {"accuracy": 0.9}}
    return {
        "dense": {"metric": {"accuracy": 0.95}},
        "steps": [{"target": (n + 1) / 10, "achieved": (n + 1) / 10, **step} for n in range(steps)],
        "sparsity": {f"layers.{n}.weight": {"zeros": n % 100, **entry} for n in range(tensors)},
        "main_metric": "accuracy",
    }


def size(path):
    height, width = imread(path).shape[:2]
    return height, width


def test_the_picture_grows_with_the_number_of_tensors_up_to_a_limit(tmp_path):
    heights = [size(sparsity_plot(report(tensors=n), tmp_path / "s.png"))[0] for n in (1, 40, 150, 300)]
    assert heights[0] < heights[1] < heights[2] == heights[3] <= 3200


def test_very_long_names_leave_room_for_the_bars(tmp_path):
    long = report()
    long["sparsity"]["encoder." * 60 + "weight"] = {"zeros": 1, "numel": 2, "pattern": "unstructured"}
    assert size(sparsity_plot(long, tmp_path / "s.png"))[1] < 1600


@pytest.mark.parametrize("change", ["nothing", "no_steps", "no_dense", "no_before", "perplexity", "empty"])
def test_the_trajectory_is_drawn_from_what_is_known(tmp_path, change):
    given = report()
    if change == "no_steps":
        given["steps"] = []
    elif change == "no_dense":
        given["dense"] = {"metric": {}}
    elif change == "no_before":
        given["steps"][0]["metric_before"] = None
    elif change == "perplexity":
        given["main_metric"] = "perplexity"
        given["steps"][0]["metric"] = {"perplexity": 30.0}
    elif change == "empty":
        given = {}
    path = trajectory_plot(given, tmp_path / "t.png")
    assert size(path)[1] > 800 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("plot", [sparsity_plot, trajectory_plot])
def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, plot):
    kept = tmp_path / "kept.png"
    kept.write_bytes(b"old")
    broken = report()
    broken["sparsity"]["layers.0.weight"]["zeros"] = broken["steps"][0]["metric"] = "no number"
    with pytest.raises((TypeError, AttributeError)):
        plot(broken, kept)
    assert kept.read_bytes() == b"old" and list(tmp_path.iterdir()) == [kept]
