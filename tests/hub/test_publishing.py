"""What PruningTrainer and a recipe push: our card in one commit, a tagged commit a step, and never a token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hfprune
from hfprune import PruningTrainer
from hfprune.errors import ConfigError, NotReachable
from tests.support.hub import TOKEN
from tests.support.models import logits
from tests.test_pipeline import run_recipe
from tests.training.setup import Digits, make_trainer

OURS = {"README.md", "config.json", "model.safetensors", "pruning_report.json", "sparsity.png", "trajectory.png"}


def trainer_of(folder: Path, push_every_step: bool = False, **options) -> PruningTrainer:
    recovery = {"epochs": 1, "monitor": "accuracy"}
    options |= {"hub_model_id": "user/vit", "hub_token": TOKEN, "pruning": {"recovery": recovery}}
    trainer = make_trainer(folder, **options)
    trainer.push_every_step = push_every_step
    return trainer


def files_of(hub, revision: str = "main") -> set[str]:
    return set(hub.storage.files("user/vit", revision)) - {".gitattributes"}


def no_token_anywhere(*folders: Path) -> None:
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert paths and not [path for path in paths if TOKEN.encode() in path.read_bytes()]


def test_the_trainer_pushes_model_card_report_and_pictures_in_one_commit(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    trainer = trainer_of(tmp_path / "run", hub_private_repo=True)
    trainer.train()
    commit = trainer.push_to_hub("Done", license="mit", tags=["mine"], token=TOKEN)
    assert [entry["title"] for entry in hub.storage.history("user/vit")] == ["Done", "initial commit"]
    assert commit.oid == hub.storage.commit_of("user/vit", "main") and hub.storage.read("user/vit")["private"]
    assert files_of(hub) == OURS
    card = hub.storage.content("user/vit", "README.md").decode()
    for words in ("license: mit", "- mine", "- hfprune", "pruned with hfprune", 'from_pretrained("user/vit")'):
        assert words in card
    assert "generated automatically" not in card
    report = json.loads(hub.storage.content("user/vit", "pruning_report.json"))
    assert report["main_metric"] == "accuracy" and len(report["steps"]) == 2
    assert report["pruned"]["nonzero"] < report["pruned"]["params"] and report["dense"] == {}
    no_token_anywhere(tmp_path / "run", tmp_path / "hub")
    future = trainer.push_to_hub(blocking=False)
    assert future.result().oid == hub.storage.commit_of("user/vit", "main")


def test_every_step_is_a_commit_with_a_tag(hub, tmp_path):
    trainer = trainer_of(tmp_path / "run", push_every_step=True)
    trainer.train()
    titles = [entry["title"] for entry in hub.storage.history("user/vit")]
    assert titles == ["Step 2 of 2: 80.0% pruned", "Step 1 of 2: 40.0% pruned", "initial commit"]
    assert set(hub.storage.read("user/vit")["tags"]) == {"ratio-0.4", "ratio-0.8"}
    for ratio in (0.4, 0.8):
        assert files_of(hub, f"ratio-{ratio}") == OURS
        found = hfprune.verify("user/vit", f"ratio-{ratio}")
        assert found.ok and found.zeros / found.numel == pytest.approx(ratio, abs=1e-3)
    again = hfprune.from_pretrained("user/vit", revision="ratio-0.8")
    batch = {"pixel_values": Digits(0, 4).images[:4]}
    assert torch.equal(logits(again, batch), logits(trainer.model, batch))


def test_training_goes_on_where_a_step_can_not_be_pushed(hub, tmp_path):
    trainer = trainer_of(tmp_path / "run", push_every_step=True)
    hub.faults.add("POST", "/commit/", status=403)
    with pytest.warns(UserWarning, match="was not pushed, and training goes on: committing in 'user/vit' failed"):
        trainer.train()
    assert set(hub.storage.read("user/vit")["tags"]) == {"ratio-0.8"}


def test_saves_are_pushed_as_trainer_users_expect(hub, tmp_path):
    trainer = trainer_of(tmp_path / "run", push_to_hub=True, hub_strategy="checkpoint", hub_revision="dev")
    trainer.train()
    files = files_of(hub, "dev")
    assert {"last-checkpoint/trainer_state.json", "last-checkpoint/pruning_state.json"} < files
    assert {name for name in files if "/" not in name} == OURS
    assert files_of(hub) == set()
    no_token_anywhere(tmp_path / "run", tmp_path / "hub")


def test_a_dense_trainer_keeps_trainers_card(hub, tmp_path):
    made = make_trainer(tmp_path / "unused")
    trainer = PruningTrainer(model=made.model, args=made.args, train_dataset=made.train_dataset)
    trainer.push_to_hub()
    card = hub.storage.content("user/unused", "README.md").decode()
    assert "hfprune" not in card and "generated_from_trainer" in card


def test_a_step_without_a_checkpoint_can_not_be_pushed(tmp_path):
    made = make_trainer(tmp_path, save_strategy="no")
    with pytest.raises(ConfigError, match="push_every_step: .* writes none"):
        PruningTrainer(model=made.model, args=made.args, pruning=made.pruning, push_every_step=True)


def test_a_recipe_pushes_its_result_and_its_steps(hub, tmp_path):
    output = {"push_to_hub": "user/vit", "push_every_step": True, "revision": "dev"}
    run_recipe(tmp_path / "run", baseline=None, output=output)
    titles = [entry["title"] for entry in hub.storage.history("user/vit", "dev")]
    assert titles[0] == "Upload a pruned model" and len(titles) == 4
    assert set(hub.storage.read("user/vit")["tags"]) == {"ratio-0.375", "ratio-0.5"}
    assert files_of(hub, "dev") == OURS | {"recipe.yaml"} and files_of(hub, "ratio-0.5") == OURS
    for name in ("config.json", "model.safetensors", "pruning_report.json", "recipe.yaml"):
        assert hub.storage.content("user/vit", name, "dev") == (tmp_path / "run" / name).read_bytes()


def test_a_push_that_fails_leaves_a_whole_result_and_resume_pushes_it(hub, tmp_path):
    output = {"push_to_hub": "user/vit"}
    hub.faults.add("POST", "/commit/", status=403)
    with pytest.raises(NotReachable, match="the result is whole in .*: --resume pushes it"):
        run_recipe(tmp_path / "run", baseline=None, output=output)
    assert hfprune.verify(tmp_path / "run").ok and files_of(hub) == set()
    run_recipe(tmp_path / "run", resume=True, baseline=None, output=output)
    assert files_of(hub) == OURS | {"recipe.yaml"}


def test_who_may_not_push_learns_it_before_training(hub, tmp_path, monkeypatch):
    with pytest.raises(NotReachable, match="You have no rights in other"):
        run_recipe(tmp_path / "run", output={"push_to_hub": "other/vit"})
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NotReachable, match="without a token"):
        run_recipe(tmp_path / "run", output={"push_to_hub": "user/vit"})
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_recipe_says_in_one_place_where_it_pushes(tmp_path):
    for key, place in (("push_to_hub", "output.push_to_hub"), ("hub_private_repo", "output.private")):
        with pytest.raises(ConfigError, match=f"training.{key}: is said elsewhere: use {place}"):
            run_recipe(tmp_path / "run", training={key: True})
