"""similarity(): figures, flags and warnings on models that show them, and a model that is left as it was."""

import json

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import nn

import hfprune
from hfprune.criteria import Criterion, criteria, register_criterion
from hfprune.errors import ConfigError, HfpruneError, ModelError
from tests.analysis.models import Filters
from tests.support.models import TINY


class Rows(nn.Module):
    """Two layers of four weights each."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor(first).view(2, 2))
            self.last.weight.copy_(torch.tensor(last).view(2, 2))

    def forward(self, x):
        return self.last(self.first(x))


@pytest.fixture
def given():
    """A criterion that scores by what the test says, by layer."""
    scores = {}

    @register_criterion("given")
    class Given(Criterion):
        pointwise = False

        def terms(self, name, weight):
            return torch.tensor(scores[name]).view(weight.shape)

    yield scores
    criteria.unregister("given")


@pytest.fixture
def costly():
    """A criterion that ranks as L1 does and needs data for it."""

    @register_criterion("costly")
    class Costly(Criterion):
        statistics = ("gradient",)

        def terms(self, name, weight, gradient):
            return weight.abs() + 0 * gradient

    yield "costly"
    criteria.unregister("costly")


@pytest.fixture
def by_row():
    """A criterion that compares weights within their rows."""

    @register_criterion("by_row")
    class ByRow(Criterion):
        statistics = ("input_norm",)
        pointwise = False
        by_row = True
        members = "layers"

        def terms(self, name, weight, input_norm):
            return weight.abs() * input_norm

    yield "by_row"
    criteria.unregister("by_row")


def shown(found) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.table(), highlight=False)
    return " ".join(console.export_text().split())


def test_figures_by_hand(given):
    model = Rows([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    given |= {"first.weight": [1.0, 3.0, 2.0, 4.0], "last.weight": [0.5, 2.5, 3.5, 4.5]}
    found = hfprune.similarity(model, ["l1", "given"], 0.5, granularity="weight")
    pair = ("l1", "given")
    first = found.within[pair]["first.weight"]
    assert (first.spearman, first.kendall) == (pytest.approx(0.8), pytest.approx(4 / 6))
    assert (first.overlap, first.jaccard, first.units) == (0.5, 1 / 3, 4)
    assert found.within[pair]["last.weight"].overlap == 1
    assert found.mean_within(pair).spearman == pytest.approx(0.9) and found.mean_within(pair).overlap == 0.75
    # Over all layers L1 takes the whole of the first; the other takes 0.5, 1, 2 and 2.5.
    assert found.together[pair].overlap == 0.5 and found.together[pair].jaccard == 2 / 6
    assert found.emptied == {"l1": ("first.weight",), "given": ()}
    assert found.flags[-1] == "l1: global ranking would empty layer first.weight"
    # The gap between 0.2 and 0.3 over their mean of 0.25.
    assert found.dispersion["l1"]["first.weight"].gap == pytest.approx(0.4)
    assert found.dispersion["l1"]["first.weight"].cv == pytest.approx(0.129099 / 0.25, rel=1e-4)
    assert found.to_dict()["random"] == {"overlap": 0.5, "jaccard": pytest.approx(1 / 3)}


def test_the_collapse_is_what_pruning_does():
    model = Rows([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    assert hfprune.similarity(model, "l1", 0.5, granularity="weight").emptied["l1"] == ("first.weight",)
    assert not hfprune.similarity(model, "l1", 0.25, granularity="weight").emptied["l1"]
    assert not hfprune.similarity(model, "lamp", 0.5, granularity="weight").emptied["lamp"]
    hfprune.prune(model, hfprune.PruningConfig(target=0.5))
    assert not model.first.weight.any() and model.last.weight.all()


@pytest.mark.filterwarnings("ignore:pruning.criterion")
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_the_overlap_is_that_of_what_pruning_removes(by_row, granularity, scope):
    tiny, chosen = TINY["cnn"], {}
    names = ["l1", "taylor", by_row]
    dense = tiny.build().state_dict()
    for name in names:
        model = tiny.build()
        model.load_state_dict(dense)
        config = hfprune.PruningConfig(
            criterion=name, granularity=granularity, scope=scope, target=0.5, round_to=1, min_kept=0
        )
        report = hfprune.prune(model, config, data=tiny.batch())
        if granularity == "weight":
            chosen[name] = torch.cat([mask.flatten() for mask in report.masks.kept.values()])
        else:
            chosen[name] = {layer: units - kept for layer, (units, kept) in report.groups.items()}
    model = tiny.build()
    model.load_state_dict(dense)
    found = hfprune.similarity(model, names, 0.5, granularity=granularity, data=tiny.batch())
    for pair in found.within:
        figures = found.together[pair] if scope == "global" else found.mean_within(pair)
        if granularity == "weight":
            one, other = (~chosen[name] for name in pair)
            assert figures.overlap == pytest.approx(float((one & other).sum() / one.sum()), abs=1e-6)
    if granularity == "channel" and scope == "layer":
        pruned = {name: {layer: e.pruned for layer, e in found.dispersion[name].items()} for name in names}
        assert pruned == chosen


def test_interchangeable_names_the_cheaper(costly):
    tiny = TINY["cnn"]
    found = hfprune.similarity(tiny.build(), ["costly", "l1", "l2", "random"], data=tiny.batch(), granularity="weight")
    assert "costly and l1: interchangeable within layers and over all, take the cheaper (l1)" in found.flags
    assert any(flag.startswith("l1 and l2: interchangeable") and "both need the same" in flag for flag in found.flags)
    assert not any("random" in flag for flag in found.flags)
    assert found.together["costly", "l1"].kendall == pytest.approx(1)
    assert "take the cheaper (l1)" in shown(found)


def test_cannot_discriminate_where_filters_are_gaussian():
    model = Filters([(32, 16), (32, 16)])
    with torch.no_grad():  # the filters of the second differ in size
        model.convs[1].weight *= torch.linspace(0.5, 1.5, 32).view(-1, 1, 1, 1)
    found = hfprune.similarity(model, ["l1", "random"], example_inputs=model.example())
    assert found.undecided("l1") == ["convs.0"]
    assert found.dispersion["l1"]["convs.1"].cv > 5 * found.dispersion["l1"]["convs.1"].floor
    assert found.undecided("random") == ["convs.0", "convs.1"]
    lines = [flag.partition(":")[0] + flag.partition(":")[2].split(":")[0] for flag in found.flags]
    assert lines == ["l1 cannot discriminate in convs.0", "random cannot discriminate in every layer"]
    assert found.normality["convs.0.weight"].p > 0.05 > found.normality["convs.1.weight"].p


def test_constant_scores_discriminate_nothing(given):
    model = Rows([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    given |= {"first.weight": [1.0] * 4, "last.weight": [0.5, 2.5, 3.5, 4.5]}
    found = hfprune.similarity(model, ["l1", "given"], granularity="weight")
    assert found.undecided("given") == ["first.weight"] and not found.undecided("l1")
    assert found.within["l1", "given"]["first.weight"].spearman is None
    assert "–" in shown(found)


@pytest.mark.parametrize("granularity", ["weight", "block:2x2", "channel", ["head", "neuron"]])
def test_the_model_is_left_as_it_was_and_all_is_plain(granularity):
    tiny = TINY["vit"]
    model = tiny.build().train()
    before = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    found = hfprune.similarity(model, ["l1", "l2", "taylor"], 0.3, granularity=granularity, data=tiny.batch())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(id(v) == before[n][0] and torch.equal(v, before[n][1]) for n, v in model.named_parameters())
    again = hfprune.similarity(tiny.build(), ["l1"], granularity=granularity, data=tiny.batch())
    assert again.layers == found.layers

    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(values) >= {"format_version", "criteria", "ratio", "layers", "pairs", "dispersion", "normality", "flags"}
    assert [pair["criteria"] for pair in values["pairs"]] == [["l1", "l2"], ["l1", "taylor"], ["l2", "taylor"]]
    for pair in values["pairs"]:
        assert set(pair["layers"]) == set(values["layers"])
        for entry in (pair["global"], pair["within"], *pair["layers"].values()):
            assert set(entry) == {"spearman", "kendall", "overlap", "jaccard", "units"}
            assert all(v is None or -1 <= v <= 1 for k, v in entry.items() if k != "units")
    for entry in values["dispersion"].values():
        assert set(entry) == {"global", "layers", "cannot_discriminate", "emptied"}
    assert values["pairs"][0]["global"]["units"] == sum(values["layers"].values())
    for words in ("at random", "Spearman", "Gaussian CV"):
        assert words in shown(found)


def test_the_same_seed_gives_the_same_and_samples_say_so():
    tiny = TINY["cnn"]
    torch.manual_seed(0)
    a = tiny.build()
    torch.manual_seed(0)
    b = tiny.build()
    one, other = (hfprune.similarity(m, ["l1", "random"], granularity="weight", seed=3, sample=100) for m in (a, b))
    assert one.to_dict() == other.to_dict()
    assert "of more than 100 units are those of a sample" in shown(one)
    whole = hfprune.similarity(a, ["l1", "random"], granularity="weight", seed=3)
    pair = ("l1", "random")
    assert one.together[pair].overlap == whole.together[pair].overlap
    assert one.together[pair].spearman != whole.together[pair].spearman
    assert "sample" not in shown(whole)


def test_channels_are_the_default_where_the_structure_can_be_read():
    tiny = TINY["cnn"]
    assert hfprune.similarity(tiny.build(), "l1", data=tiny.batch()).granularity == ("channel",)
    recurrent = TINY["lstm"]
    found = hfprune.similarity(recurrent.build(), "l1", data=recurrent.batch())
    assert found.granularity == ("weight",) and "single weights" in shown(found)


def test_criteria_with_parameters_and_an_iterator_of_batches():
    tiny = TINY["cnn"]
    wanted = ["taylor", {"name": "taylor", "absolute": True}, {"name": "taylor", "batches": 1}]
    found = hfprune.similarity(tiny.build(), wanted, data=(tiny.batch() for _ in range(3)))
    assert found.criteria == ("taylor", "taylor(absolute=True)", "taylor(batches=1)")
    assert found.together["taylor", "taylor(batches=1)"].overlap == 1  # the batches are alike


@pytest.mark.parametrize("names", [["l1"], ["l1", "l2", "random"]])
def test_the_picture_is_written_whole(tmp_path, names):
    path = hfprune.similarity(Filters([(8, 3)] * 3), names, granularity="weight").plot(tmp_path / "s.png")
    picture = imread(path)
    assert picture.shape[0] > 200 and picture.shape[1] > 400 and picture.std() > 0.05
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("granularity", ["weight", "channel"])
@pytest.mark.parametrize("name", list(criteria))
def test_every_criterion_that_fits_can_be_compared(name, granularity):
    tiny = TINY["cnn"]
    given = {"granularity": granularity, "data": tiny.batch()}
    if criteria[name].of_blocks or (getattr(criteria[name], "of_units", False) and granularity == "weight"):
        with pytest.raises(ConfigError, match=f"'{name}' scores whole"):
            hfprune.similarity(tiny.build(), [name], **given)
        return
    if criteria[name].of_components:
        with pytest.raises(ConfigError, match=f"'{name}' scores the components of factored weights"):
            hfprune.similarity(tiny.build(), [name], **given)
        return
    if name == "sparsegpt":
        with pytest.raises(ConfigError, match="'sparsegpt' (has no scores|prunes single weights)"):
            hfprune.similarity(tiny.build(), [name], **given)
        return
    names = ["l1", name] if name != "l1" else ["l1", "l2"]
    try:
        found = hfprune.similarity(tiny.build(), names, **given)
    except ConfigError as error:  # not every criterion has something to look at in every layer
        assert f"'{name}' can't score" in str(error)
        return
    assert all(entry.pruned == round(0.5 * entry.units) for entry in found.dispersion[name].values())
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("criteria", "options", "message"),
    [
        (["l1", "tailor"], {}, "unknown criterion 'tailor'; did you mean 'taylor'?"),
        ([{"name": "taylor", "batch": 3}], {}, "pruning.criterion.batch: 'taylor' takes no such parameter"),
        ([], {}, "criteria: none given"),
        (["l1", "l1"], {}, "criteria: 'l1' stands twice"),
        (["l1"], {"ratio": 1.0}, "ratio: 1.0 must lie between 0 and 1"),
        (["l1"], {"ratio": "half"}, "ratio: 'half' must lie between 0 and 1"),
        (["l1", "taylor"], {}, "'taylor' scores by gradients and needs data"),
        (["block_influence"], {}, "'block_influence' scores whole blocks"),
        (["l1"], {"granularity": "2:4"}, "granularity: '2:4' has no units to rank"),
        (["l1"], {"granularity": "layer"}, "granularity: 'layer' has no units to rank"),
        (["l1"], {"granularity": "chanel"}, "unknown granularity 'chanel'"),
        (["l1"], {"normalize": "most"}, "normalize: input should be 'mean', 'max' or 'none'"),
        (["l1"], {"include": ["nothing"]}, "pruning.include: 'nothing' matches nothing"),
        (["l1"], {"sample": 1}, "sample: 1 units can't be ranked"),
    ],
)
def test_bad_input_is_one_line(criteria, options, message):
    with pytest.raises(ConfigError) as caught:
        hfprune.similarity(TINY["cnn"].build(), criteria, **{"granularity": "weight"} | options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_models_that_can_not_be_looked_at():
    with pytest.raises(HfpruneError, match="ReLU has no weights of linear maps or convolutions"):
        hfprune.similarity(nn.ReLU(), "l1")
    broken = TINY["cnn"].build()
    with torch.no_grad():
        broken.conv1.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="conv1"):
        hfprune.similarity(broken, "l1", granularity="weight")
