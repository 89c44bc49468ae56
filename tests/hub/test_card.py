import pytest
from huggingface_hub import ModelCard

import hfprune
from hfprune import PruningConfig
from hfprune.errors import ConfigError
from hfprune.hub.card import check_template, render_card, template_path, write_card
from hfprune.recipe import Recipe
from tests.support import models
from tests.support.surgery import SMALL

LOADING = 'model = AutoModelForImageClassification.from_pretrained("me/small")'


def recipe(**pruning):
    return Recipe.parse(
        {
            "model": {"name": "timm/vit_tiny_patch16_224"},
            "data": {"name": "digits", "task": "image-classification"},
            "pruning": {"target": 0.8, "schedule": {"kind": "hybrid", "first": 0.6, "steps": 1}, **pruning},
            "output": {"folder": "runs/small"},
        }
    )


def report(**changes):
    side = {"params": 100, "bytes": 400, "macs": 90, "latency_ms": {"1": 2.0}, "memory_bytes": None}
    return {
        "dense": {"metric": {"accuracy": 0.97, "loss": 0.1}, "nonzero": 100, **side},
        "pruned": {"metric": {"accuracy": 0.96, "loss": 0.2}, "nonzero": 20, **side},
        "steps": [
            {
                "target": t,
                "achieved": t,
                "metric_before": {"accuracy": 0.5},
                "metric": {"accuracy": 0.96},
                "epochs": 3.0,
            }
            for t in (0.6, 0.8)
        ],
        "sparsity": {"head.weight": {"zeros": 80, "numel": 100, "pattern": "unstructured"}},
        "recipe": recipe().model_dump(mode="json"),
        "main_metric": "accuracy",
        "base_model": "timm/vit_tiny_patch16_224.augreg_in21k",
        "seconds": 180.0,
        "seed": 0,
        "environment": {"torch": "2.15.0", "machine": "2 CPU cores (x86_64)", "device": "cpu", "dtype": "float32"},
        **changes,
    }


def render(given=None, **parts):
    parts = {"recipe_yaml": recipe().to_yaml(), "kind": "transformers", "loading": LOADING, **parts}
    return render_card(report() if given is None else given, **parts)


def test_the_metadata_reads_back():
    card = ModelCard(render(license="apache-2.0", datasets="mnist", language=["en"]))
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert data["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k" and data["base_model_relation"] == "finetune"
    assert data["tags"] == ["pruned", "sparse", "hfprune", "unstructured"]
    assert data["license"] == "apache-2.0" and data["datasets"] == ["mnist"] and data["language"] == ["en"]


def test_the_measured_metrics_read_back_from_the_model_index():
    card = ModelCard(render())
    found = {(r.metric_name, r.metric_value, r.dataset_name, r.task_type) for r in card.data.eval_results}
    task = ("digits", "image-classification")
    assert found == {
        ("accuracy", 0.96, *task),
        ("loss", 0.2, *task),
        ("accuracy (dense, before pruning)", 0.97, *task),
        ("loss (dense, before pruning)", 0.1, *task),
    }
    assert card.data.model_name == "small"


def test_what_is_not_known_is_not_said():
    bare = {"dense": {"params": 10}, "pruned": {"params": 10}, "sparsity": {}}
    text = render(bare, recipe_yaml=None, kind="module")
    data = ModelCard(text).data.to_dict()
    assert data["tags"] == ["pruned", "sparse", "hfprune", "pytorch"]
    assert not {"base_model", "base_model_relation", "library_name", "license", "datasets", "language"} & set(data)
    assert not {"pipeline_tag", "model-index"} & set(data)
    words = ("Latency:", "atency", "MACs", "Recipe", "accuracy", "None", "seed", "Made with", "How it went")
    assert not any(word in text for word in words)


def test_the_base_model_passes_on_its_licence_languages_and_data():
    origin = {
        "license": "other",
        "license_name": "small-licence",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "datasets": ["cifar10", "imagenet-1k"],
        "base_model": ["me/base-of-the-base"],
    }
    data = ModelCard(render(report(origin=origin))).data.to_dict()
    assert [data.get(key) for key in origin] == [*list(origin.values())[:-1], "timm/vit_tiny_patch16_224.augreg_in21k"]
    # A local model's own base is what the Hub knows.
    data = ModelCard(render(report(origin=origin, base_model=None))).data.to_dict()
    assert data["base_model"] == ["me/base-of-the-base"] and data["base_model_relation"] == "finetune"
    assert "base-of-the-base" not in ModelCard(render(report(origin=origin, base_model=None))).text


def test_a_configuration_of_the_data_stands_beside_its_results():
    given = report()
    given["recipe"]["data"] |= {"name": "glue", "config": "sst2", "eval_split": "validation"}
    result = ModelCard(render(given)).data.eval_results[0]
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("glue", "sst2", "validation")


def test_energy_and_emissions_stand_where_they_were_estimated():
    spent = {"energy_kwh": 0.0021, "co2_grams": 0.75, "location": "France", "source": "codecarbon 3.3.2"}
    text = render(report(emissions=spent))
    found = ModelCard(text).data.to_dict()["co2_eq_emissions"]
    assert (found["emissions"], found["source"], found["geographical_location"]) == (0.75, "codecarbon 3.3.2", "France")
    assert found["hardware_used"] == "2 CPU cores (x86_64)"
    assert "- energy: 2.1 Wh (the whole machine, estimated by codecarbon 3.3.2)" in text
    assert "- emissions: 0.75 g of CO2 equivalents (France)" in text
    del spent["co2_grams"]
    assert "co2_eq_emissions" not in ModelCard(render(report(emissions=spent))).data.to_dict()
    assert "energy" not in render() and "emissions" not in render()


def test_a_sparse_file_is_smaller_and_the_model_is_not():
    text = render(report(stored_sparse=True))
    assert "**Only the file is smaller:**" in text and "neither the file" not in text


def test_latency_stands_with_its_machine_batch_and_dtype():
    text = render()
    assert "| latency, batch 1 | 2.00 ms | 2.00 ms | 1.00x |" in text
    assert "on 2 CPU cores (x86_64), float32." in text


def test_the_text_says_what_was_done_and_what_it_cost():
    text = render()
    assert "80.00 % of the 100 values in 1 tensor are zero (80)" in text
    assert "criterion `l1`" in text and "in 2 steps to 60 % and 80 % (schedule `hybrid`)" in text
    assert "from 97.00 % to 96.00 % (-1.00 points)" in text and "6 epochs in all" in text
    assert "neither the file smaller nor the model faster" in text
    assert "| 2 | 80.00 % | 80.00 % | 50.00 % | 96.00 % |" in text
    assert f"```python\n{LOADING}\n```" in text and "3 min 0 s" in text


@pytest.mark.parametrize(
    ("granularity", "pattern", "tag", "words"),
    [
        ("2:4", "2:4", "nm", "2 of every 4 neighbouring weights"),
        ("block:4x4", "block:4x4", "block", "blocks of 4 x 4 weights"),
    ],
)
def test_patterns_have_their_tag_and_words(granularity, pattern, tag, words):
    target = {"target": None} if ":" in granularity and granularity[0].isdigit() else {}
    made = recipe(granularity=granularity, schedule="one_shot", recovery={"epochs": 3, "patience": [2, 1]}, **target)
    entry = {"zeros": 8, "numel": 16, "pattern": pattern}
    text = render(report(recipe=made.model_dump(mode="json"), sparsity={"head.weight": entry}))
    assert tag in ModelCard(text).data.tags and words in text
    assert (
        "in one step (schedule `one_shot`), followed by fine-tuning for at most 3 epochs, ended after 2, then 1" in text
    )


def test_a_smaller_model_needs_no_word_on_zeros():
    smaller = report()
    smaller["pruned"]["params"] = 50
    assert "neither the file" not in render(smaller)


def test_text_of_the_user_breaks_nothing():
    nasty = "pruning:\n  note: |\n    ```\n    # not a heading {{ 7 * 7 }}\n    ````\n\n\n    end"
    text = render(recipe_yaml=nasty)
    assert f"`````yaml\n{nasty}\n`````" in text and "49" not in text
    named = render(name="a: b # c\n---\n- x")
    assert ModelCard(named).data.model_name == "a: b # c --- - x"


@pytest.mark.parametrize("base", ["./runs/dense", "/data/models/dense", "C:\\models\\dense"])
def test_a_local_base_model_and_local_data_are_not_told(base):
    given = report(base_model=base)
    given["recipe"]["data"]["name"] = "/data/private/pets"
    given["recipe"]["model"]["name"] = base
    text = render(given, recipe_yaml=None)
    assert base not in text and "/data/private" not in text and "base_model" not in text
    assert ModelCard(text).data.eval_results[0].dataset_name == "pets"


def test_the_recipe_says_nothing_of_where_things_lie_on_this_machine():
    given = report()
    places = {"model": "/home/me/models/dense", "data": "C:\\Users\\me\\pets", "output": "~/runs/small"}
    for part, path in places.items():
        given["recipe"][part]["folder" if part == "output" else "name"] = path
    text = render(given, recipe_yaml="\n".join(f"{part}: {path}" for part, path in places.items()))
    assert "model: dense\ndata: pets\noutput: small\n" in text
    assert not any(path in text for path in places.values())
    relative = report()
    assert "folder: runs/small" in render(relative, recipe_yaml="output:\n  folder: runs/small")


def test_a_baseline_of_the_same_run_is_told():
    given = report(base_model=None)
    given["recipe"] |= {"baseline": {"epochs": 30}}
    given["recipe"]["model"]["pretrained"] = False
    assert "Before that the dense model was trained for 30 epochs, from random weights." in render(given)
    given["recipe"]["baseline"] = {"max_steps": 500}
    assert "was trained for 500 optimizer steps, from" in render(given)


def test_the_file_is_named_after_its_folder_and_shows_the_pictures_that_are_there(tmp_path):
    folder = tmp_path / "vit-80"
    folder.mkdir()
    parts = {"recipe_yaml": None, "kind": "timm", "loading": LOADING}
    path = write_card(folder, report(), **parts)
    text = path.read_text(encoding="utf-8")
    assert path == folder / "README.md" and "\n# vit-80\n" in text and "png" not in text
    (folder / "sparsity.png").write_bytes(b"")
    assert "(sparsity.png)" in write_card(folder, report(), **parts).read_text(encoding="utf-8")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "sparsity.png"]
    assert "trajectory.png" not in path.read_text(encoding="utf-8")


def test_a_card_that_cannot_be_made_leaves_the_old_one(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    template = tmp_path / "own.jinja"
    template.write_text("{{ no_such_thing }}")
    parts = {"recipe_yaml": None, "kind": "timm", "loading": LOADING}
    with pytest.raises(ConfigError, match="no_such_thing"):
        write_card(tmp_path, report(), template=template, **parts)
    with pytest.raises(ConfigError, match="can't be read"):
        write_card(tmp_path, report(), template=tmp_path / "missing.jinja", **parts)
    assert (tmp_path / "README.md").read_text() == "mine"
    template.write_text("# {{ name }}: {{ main_metric }}")
    assert "accuracy" in write_card(tmp_path, report(), template=template, **parts).read_text()


def test_a_template_may_hold_the_metadata_too(tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("---\n{{ card_data }}\nthumbnail: trajectory.png\n---\n# {{ name }}\n")
    card = ModelCard(render(template=own))
    assert card.data.to_dict()["thumbnail"] == "trajectory.png" and card.data.library_name == "transformers"
    assert card.text.strip() == "# small"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("---\n{{ card_data }}\nlanguage: English\n---\n", "the card's metadata.language.*'English'"),
        ("---\n{{ card_data }}\n", "the card has no metadata"),
        ("---\nname: {{ name }}: x\n---\n", "the card's metadata can't be read"),
        ("{{ environment.zzz.zzz }}", "does not render"),
        ("{{ 1 / 0 }}", "does not render: division by zero"),
        ("{{ name.__class__.__mro__ }}", "does not render: access to attribute '__class__'"),
    ],
)
def test_a_template_that_breaks_the_card_is_refused_in_one_line(tmp_path, text, line):
    own = tmp_path / "own.jinja"
    own.write_text(text)
    check_template(own)
    with pytest.raises(ConfigError, match=line) as raised:
        render(template=own)
    assert "\n" not in str(raised.value)


def test_a_template_is_checked_before_there_is_a_card(tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{{ summry }}")
    with pytest.raises(ConfigError, match="uses the unknown variable 'summry'; did you mean 'summary'"):
        check_template(own)
    own.write_text("{% if %}")
    with pytest.raises(ConfigError, match="does not render"):
        check_template(own)
    with pytest.raises(ConfigError, match="can't be read"):
        check_template(tmp_path / "missing.jinja")
    check_template(template_path())


# ---- from a checkpoint alone ----------------------------------------------------------------------------------------


def test_a_model_pruned_without_a_run_has_a_card_of_what_is_recorded(tmp_path):
    model = models.vit()
    hfprune.prune(model, PruningConfig(criterion="l2", granularity="2:4"))
    hfprune.save_pretrained(model, tmp_path / "half")
    text = write_card(tmp_path / "half").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["tags"] == ["pruned", "sparse", "hfprune", "nm"] and data["library_name"] == "transformers"
    assert "A `ViTForImageClassification`, pruned with hfprune" in text
    assert "criterion `l2`" in text and "2 of every 4" in text and "scope" not in text
    assert not {"model-index", "pipeline_tag"} & set(data)
    assert not any(word in text for word in ("Before and after", "Recipe", "atency", "seed"))


def test_measurements_of_ones_own_go_into_the_table(tmp_path):
    model = models.vit()
    dense = hfprune.measure(model, batch_sizes=())
    hfprune.prune(model, PruningConfig(target=0.5))
    hfprune.save_pretrained(model, tmp_path)
    measured = {"dense": dense.to_dict(), "pruned": hfprune.measure(model, batch_sizes=()).to_dict()}
    text = write_card(tmp_path, measured).read_text()
    assert f"| parameters | {dense.params:,} | {dense.params:,} | 1.00x |" in text and "atency" not in text


@pytest.mark.parametrize("name", ["llama", "timm_vit"])
def test_a_smaller_model_says_what_is_left(tmp_path, name):
    hfprune.save_pretrained(SMALL[name].build(), tmp_path)
    text = write_card(tmp_path).read_text()
    tags = ["pruned", "structured-pruning", "hfprune"]
    assert ModelCard(text).data.tags == tags and "50.00 % of the units are gone." in text
    assert "zeros alone" not in text


def test_a_sparse_checkpoint_says_that_its_file_is_smaller(tmp_path):
    model = models.vit()
    hfprune.prune(model, PruningConfig(target=0.9))
    hfprune.save_pretrained(model, tmp_path, sparse="bitmask")
    assert "**Only the file is smaller:**" in write_card(tmp_path).read_text()


def test_the_template_is_found_without_installation():
    assert template_path().is_file()
