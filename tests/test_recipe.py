"""Recipes: YAML both ways, overrides, and one line for whatever does not fit."""

from pathlib import Path

import pytest

from hfprune import Recipe
from hfprune.errors import ConfigError
from hfprune.recipe import load_yaml

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))

TEXT = """
model: {name: timm/resnet18, pretrained: false}
data: {name: digits}
pruning:
  criterion: l1
  target: 0.8
  schedule: geometric
training: {learning_rate: 1e-3, num_train_epochs: 1}
output: {folder: runs/example}
"""


@pytest.fixture
def write(tmp_path):
    def write(text=TEXT):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path, overrides=None):
    with pytest.raises(ConfigError) as error:
        Recipe.from_yaml(path, overrides)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_reads_a_recipe(write):
    recipe = Recipe.from_yaml(write())
    assert recipe.pruning.ratio == 0.8
    assert recipe.training == {"learning_rate": 1e-3, "num_train_epochs": 1}
    assert recipe.data.task == "image-classification"
    assert recipe.output.batch_sizes == [1, 32]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_projects_recipes_read_and_write(path, tmp_path):
    recipe = Recipe.from_yaml(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(copy) == recipe
    assert Recipe.from_yaml(copy).to_yaml() == recipe.to_yaml()


def test_there_are_recipes():
    assert RECIPES


def test_what_was_not_said_is_not_written(write):
    text = Recipe.from_yaml(write()).to_yaml()
    assert "min_kept" not in text
    assert "baseline" not in text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2:4", "2:4"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("012", 12),
        ("~", None),
        (".5", 0.5),
        ("1_000", "1_000"),
        ("2026-01-02", "2026-01-02"),
        ("-1.5E+3", -1500.0),
        (".inf", float("inf")),
    ],
)
def test_plain_words(text, value):
    assert load_yaml(text) == value
    assert type(load_yaml(text)) is type(value)


@pytest.mark.parametrize("word", ["no", "2:4", "1e-3", "true", "null", "12", "ünï", "a: b", "# x", "", "~", "0x1F"])
def test_words_survive_the_way_there_and_back(write, word):
    recipe = Recipe.from_yaml(write()).model_copy(update={"training": {"run_name": word}})
    assert load_yaml(recipe.to_yaml())["training"]["run_name"] == word


def test_overrides_in_their_order(write):
    recipe = Recipe.from_yaml(
        write(),
        [
            "pruning.target.ratio=.7",
            "pruning.schedule.steps=3",
            "pruning.criterion.name=taylor",
            "pruning.criterion.batches=2",
            "training.learning_rate=5e-4",
            "output.batch_sizes=[1, 8]",
            "training.learning_rate=1e-4",
            "pruning.granularity=block:2x2",
        ],
    )
    assert recipe.pruning.ratio == 0.7
    assert recipe.pruning.schedule.kind == "geometric"
    assert recipe.pruning.schedule.steps == 3
    assert recipe.pruning.criterion == {"name": "taylor", "batches": 2}
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.output.batch_sizes == [1, 8]
    assert recipe.pruning.granularity == "block:2x2"


def test_an_override_opens_a_missing_section(write):
    recipe = Recipe.from_yaml(write(), ["baseline.epochs=3", "pruning.recovery.patience=[9, 2]"])
    assert recipe.baseline == {"epochs": 3}
    assert recipe.pruning.recovery.patience == [9, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning.target.ratio", "--set pruning.target.ratio: expected key.key=value"),
        ("=3", "--set =3: expected key.key=value"),
        ("a..b=3", "--set a..b=3: expected key.key=value"),
        ("data.name.x=3", "--set data.name.x=3: 'name' is 'digits', which has no keys of its own"),
        ("training.x=[1", "--set training.x=[1: '[1' is not valid YAML"),
        ("pruning.taget=3", "pruning.taget: unknown key; did you mean 'target'?"),
        ("modl.name=3", "modl: unknown key; did you mean 'model'?"),
        ("pruning.target=2", "pruning.target.ratio: input should be less than 1, not 2"),
        ("data.task=image-clasification", "data.task: input should be 'image-classification'"),
        ("model.name=''", "model.name: string should have at least 1 character, not ''"),
        ("data.name=''", "data.name: string should have at least 1 character, not ''"),
        ("output.folder=''", "output.folder: string should have at least 1 character, not ''"),
        ("data.image_size=0", "data.image_size: input should be greater than or equal to 1, not 0"),
        ("data.image_size=[8, 0]", "data.image_size.1: input should be greater than or equal to 1, not 0"),
        ("data.std=[.nan]", "data.std.0: input should be a finite number, not nan"),
        ("data.augment=no", "data.augment: input should be a valid boolean, not 'no'; write false, without quotes"),
        ("baseline.lr=3", "baseline.epochs: missing, e.g. {epochs: 30}"),
        ("pruning.schedule.kind=cubik", "pruning.schedule.kind: unknown schedule 'cubik'; did you mean 'cubic'?"),
    ],
)
def test_wrong_overrides(write, override, message):
    assert refusal(write(), [override]).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "a recipe is a map with the keys model, data, baseline, pruning, training, output"),
        ("", "a recipe is a map with the keys model"),
        ("model: [", "not valid YAML"),
        ("model: {name: a, name: b}", "the key 'name' stands twice"),
        ("model: !!python/object:os.system {}", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_what_is_no_recipe(write, text, message):
    path = write(text)
    line = refusal(path)
    assert line.startswith(str(path))
    assert message in line


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: \xff\xfe")
    assert "not valid YAML" in refusal(path)


def test_a_missing_section_is_named(write):
    assert refusal(write(TEXT.replace("data: {name: digits}", ""))).startswith("data: ")


def test_a_missing_file_is_answered_with_one_beside_it(write):
    path = write()
    assert refusal(path.with_name("recip.yaml")) == (
        f"--recipe: no file '{path.with_name('recip.yaml')}'; did you mean '{path}'?"
    )
    assert refusal(path.parent / "nowhere" / "x.yaml").endswith("x.yaml'")


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["output.push_to_hub=true"], "output.push_to_hub: "),
        (["output.push_to_hub=name alone"], "output.push_to_hub: must be OWNER/NAME on the Hub, or false"),
        (["output.push_to_hub=a/b/c"], "output.push_to_hub: must be OWNER/NAME"),
        (["output.private=true"], "output.private: says how to push, but nothing is pushed; add push_to_hub"),
        (["output.push_every_step=true"], "output.push_every_step: says how to push"),
        (["output.revision=dev"], "output.revision: says how to push"),
    ],
)
def test_where_to_push_is_checked(write, overrides, line):
    assert refusal(write(), overrides).startswith(line)


@pytest.mark.parametrize("key", ["training.hub_token", "model.args.token", "data.name"])
def test_a_recipe_with_a_token_is_refused_without_showing_it(write, key):
    line = refusal(write(), [f"{key}=hf_{'a' * 34}"])
    assert line.startswith(f"{key}: holds what looks like an access token") and "aaa" not in line
