"""PruningTrainer: schedules, recovery, exact zeros, and everything that Trainer does staying as it is."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForImageClassification, TrainerCallback, TrainingArguments

import hfprune
from hfprune import PruningTrainer
from hfprune.errors import CheckpointError, ConfigError, TrainingDiverged
from tests.training.setup import Digits, PlainNet, accuracy, make_trainer, tiny_vit


def zeros_held(trainer: PruningTrainer) -> bool:
    parameters = dict(trainer.model.named_parameters())
    return all(bool((parameters[name][~kept] == 0).all()) for name, kept in trainer.masks.kept.items())


@pytest.mark.parametrize(
    ("schedule", "targets"),
    [
        ({"kind": "one_shot"}, [0.8]),
        ({"kind": "constant", "steps": 2}, [0.4, 0.8]),
        ({"kind": "geometric", "steps": 2}, [1 - 0.2**0.5, 0.8]),
        ({"kind": "cubic", "steps": 2}, [0.8 * (1 - 0.5**3), 0.8]),
        ({"kind": "hybrid", "steps": 2, "first": 0.6}, [0.6, 0.6 + 1 - 0.8**0.5, 0.8]),
    ],
)
def test_every_schedule_reaches_its_exact_counts(tmp_path, schedule, targets):
    trainer = make_trainer(tmp_path, pruning={"schedule": schedule, "recovery": {"steps": 2}})
    trainer.train()
    assert [step.target for step in trainer.steps] == pytest.approx(targets)
    units = trainer.pruner.total_units
    assert [round(step.achieved * units) for step in trainer.steps] == [round(t * units) for t in targets]
    assert trainer.masks.zeros == round(0.8 * units)
    assert zeros_held(trainer)
    assert all(step.metric_before and step.metric for step in trainer.steps)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_zeros_stay_zero_whatever_the_optimizer(tmp_path, optimizer):
    options = {"optim": optimizer, "weight_decay": 0.1}
    if optimizer == "sgd":
        options["optim_args"] = "momentum=0.9"
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(zeros_held(trainer))

    trainer = make_trainer(tmp_path, pruning={"recovery": {"epochs": 1}}, callbacks=[Watch()], **options)
    trainer.train()
    assert len(seen) == 8 and all(seen)


def test_masks_only_grow(tmp_path):
    trainer, held = make_trainer(tmp_path, pruning={"schedule": {"kind": "geometric", "steps": 3}}), []
    prune = trainer._prune_to

    def watched(target):
        achieved = prune(target)
        held.append(copy.deepcopy(trainer.masks.kept))
        return achieved

    trainer._prune_to = watched
    trainer.train()
    for earlier, later in zip(held, held[1:], strict=False):
        assert all(bool((later[name] <= earlier[name]).all()) for name in earlier)


def test_gradual_pruning_inside_one_run(tmp_path):
    sparsity = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            sparsity[state.global_step] = trainer.masks.zeros

    trainer = make_trainer(
        tmp_path,
        pruning={"schedule": {"kind": "cubic", "steps": 3, "every": 3}, "recovery": {"epochs": 3}},
        callbacks=[Watch()],
    )
    trainer.train()
    units = trainer.pruner.total_units
    counts = [round(units * 0.8 * (1 - (1 - t / 3) ** 3)) for t in range(3)] + [round(units * 0.8)]
    assert [sparsity[step] for step in range(1, 13)] == [counts[min(3, (step - 1) // 3)] for step in range(1, 13)]
    assert [step.target for step in trainer.steps] == pytest.approx([0.8 * (1 - (1 - t / 3) ** 3) for t in (1, 2, 3)])
    assert zeros_held(trainer)


@pytest.mark.parametrize("granularity", ["2:4", "block:4x4"])
@pytest.mark.parametrize("criterion", ["taylor", "snip", "movement", "lamp", "random"])
def test_criteria_and_granularities_in_training(tmp_path, criterion, granularity):
    # The classifier's ten rows would leave blocks cut off by the edge.
    pruning = {"criterion": criterion, "granularity": granularity, "target": 0.5, "ignore": "classifier"}
    trainer = make_trainer(tmp_path, pruning=pruning | {"recovery": {"steps": 2}})
    trainer.train()
    assert trainer.masks.zeros == round(0.5 * trainer.pruner.total_units) * (16 if "block" in granularity else 1)
    assert zeros_held(trainer)


def test_movement_adds_up_weight_times_gradient(tmp_path):
    expected = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            weight = model.vit.layers[0].mlp.fc1.weight
            expected["sum"] = expected.get("sum", 0) + weight.detach().double() * weight.grad.double()

    trainer = make_trainer(tmp_path, pruning={"criterion": "movement"}, callbacks=[Watch()], max_grad_norm=0.5)
    trainer.train()
    torch.testing.assert_close(
        trainer.history["vit.layers.0.mlp.fc1.weight"].double(), expected["sum"], rtol=1e-4, atol=1e-9
    )


class Scripted(TrainerCallback):
    """Replaces what evaluations say, in order."""

    def __init__(self, values):
        self.values = list(values)

    def attach(self, trainer):
        evaluate = trainer.evaluate

        def scripted(*args, **kwargs):
            trainer.recovery._in_phase, before = False, trainer.recovery._in_phase
            metrics = evaluate(*args, **kwargs)
            trainer.recovery._in_phase = before
            metrics["eval_accuracy"] = self.values.pop(0)
            if before:
                trainer.recovery.on_evaluate(
                    trainer.args, trainer.state, trainer.control, metrics=metrics, model=trainer.model
                )
            return metrics

        trainer.evaluate = scripted


def test_patience_ends_a_phase_and_restores_the_best_weights(tmp_path):
    weights = {}

    class Watch(TrainerCallback):
        def on_epoch_end(self, args, state, control, model, **_):
            weights[state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}

    trainer = make_trainer(
        tmp_path,
        pruning={"schedule": "one_shot", "recovery": {"epochs": 9, "patience": 2, "monitor": "accuracy"}},
        callbacks=[Watch()],
    )
    Scripted([0.1, 0.5, 0.9, 0.2, 0.3]).attach(trainer)
    trainer.train()
    assert trainer.steps[0].epochs == 4
    assert trainer.steps[0].metric["accuracy"] == 0.9
    best = weights[8]
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())
    assert not torch.equal(weights[16]["classifier.bias"], best["classifier.bias"])


def test_the_best_starts_from_the_weights_right_after_pruning(tmp_path):
    trainer = make_trainer(
        tmp_path, pruning={"schedule": "one_shot", "recovery": {"epochs": 9, "patience": 2, "monitor": "accuracy"}}
    )
    dense = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    Scripted([0.7, 0.5, 0.6]).attach(trainer)
    trainer.train()
    assert trainer.steps[0].metric["accuracy"] == 0.7
    for name, value in trainer.model.state_dict().items():
        kept = trainer.masks.kept.get(name)
        assert torch.equal(value, dense[name] if kept is None else dense[name] * kept)


def test_min_delta_and_a_patience_for_each_step(tmp_path):
    recovery = {"epochs": 9, "patience": [3, 1], "min_delta": 0.05, "monitor": "accuracy"}
    trainer = make_trainer(tmp_path, pruning={"recovery": recovery})
    # Better by less than min_delta does not reset the patience, but its weights are the best all the same.
    Scripted([0.5, 0.52, 0.53, 0.54, 0.5, 0.5]).attach(trainer)
    trainer.train()
    assert [step.epochs for step in trainer.steps] == [3, 1]
    assert trainer.steps[0].metric["accuracy"] == 0.54


def test_a_shrinking_metric_is_watched_downwards(tmp_path):
    trainer = make_trainer(tmp_path, pruning={"recovery": {"epochs": 2, "patience": 1, "monitor": "loss"}})
    assert trainer.recovery.greater_is_better is False
    trainer.train()
    for step in trainer.steps:
        assert step.metric["loss"] <= step.metric_before["loss"]


def test_optimizer_and_scheduler_are_new_in_every_phase(tmp_path):
    begins = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, lr_scheduler, **_):
            if state.global_step % 8 == 0:
                begins.append((id(optimizer), len(optimizer.state), lr_scheduler.get_last_lr()[0]))

    trainer = make_trainer(tmp_path, callbacks=[Watch()])
    trainer.train()
    assert len(begins) == 2
    assert begins[0][0] != begins[1][0]
    assert all(states == 0 and rate == pytest.approx(3e-3) for _, states, rate in begins)


def test_an_optimizer_of_ones_own_is_used_and_begun_anew(tmp_path):
    model = tiny_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    begins = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, lr_scheduler, **_):
            if state.global_step % 8 == 0:
                begins.append((optimizer.optimizer, len(optimizer.state), lr_scheduler.get_last_lr()[0]))

    trainer = make_trainer(tmp_path, model, optimizers=(optimizer, scheduler), callbacks=[Watch()])
    trainer.train()
    assert [(o is optimizer, states, rate) for o, states, rate in begins] == [(True, 0, 0.01)] * 2
    assert zeros_held(trainer)


def test_learning_rate_of_each_phase(tmp_path):
    rates = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler, **_):
            rates[state.global_step] = lr_scheduler.get_last_lr()[0]

    trainer = make_trainer(
        tmp_path, pruning={"recovery": {"epochs": 2, "learning_rate": [1e-2, 1e-3]}}, callbacks=[Watch()]
    )
    trainer.train()
    assert (rates[0], rates[8]) == pytest.approx((1e-2, 1e-3))


def test_gradient_accumulation_logging_and_callbacks_go_on_through_phases(tmp_path):
    calls = {"train_begin": 0, "evaluate": 0, "save": 0, "substep": 0}

    class Count(TrainerCallback):
        def on_train_begin(self, *_, **__):
            calls["train_begin"] += 1

        def on_evaluate(self, *_, **__):
            calls["evaluate"] += 1

        def on_save(self, *_, **__):
            calls["save"] += 1

        def on_substep_end(self, *_, **__):
            calls["substep"] += 1

    trainer = make_trainer(tmp_path, callbacks=[Count()], gradient_accumulation_steps=2)
    output = trainer.train()
    assert output.global_step == trainer.state.global_step == 8
    assert calls == {"train_begin": 2, "evaluate": 6, "save": 4, "substep": 8}
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 6, 8]
    assert [entry["epoch"] for entry in losses] == pytest.approx([1, 2, 3, 4])
    assert all(entry["loss"] > 0 for entry in losses)
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert logged == pytest.approx([0.4, 0.8], abs=1e-3)


def test_mixed_precision_trains_and_keeps_zeros(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True)
    trainer.train()
    assert zeros_held(trainer)
    assert next(trainer.model.parameters()).dtype == torch.float32


def test_mixed_precision_holds_in_phases_that_an_evaluation_came_before(tmp_path):
    dtypes = set()
    trainer = make_trainer(tmp_path, bf16=True)

    def look(module, inputs, output):
        if module.training:
            dtypes.add(output.dtype)

    trainer.model.classifier.register_forward_hook(look)
    trainer.train()
    assert dtypes == {torch.bfloat16}


def test_a_pruned_model_stays_pruned_without_a_pruning_configuration(tmp_path):
    model = tiny_vit()
    masks = hfprune.prune(model, hfprune.PruningConfig(target=0.6)).masks
    trainer = PruningTrainer(
        model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, max_steps=3, report_to="none"),
        train_dataset=Digits(0, 32),
    )  # fmt: skip
    trainer.train()
    assert trainer.masks.digest() == masks.digest()
    assert zeros_held(trainer)


def test_a_model_pruned_further_than_the_target_is_reported_as_it_is(tmp_path):
    model = tiny_vit()
    before = hfprune.prune(model, hfprune.PruningConfig(target=0.8)).masks
    trainer = make_trainer(tmp_path, model, pruning={"target": 0.5, "recovery": {"steps": 2}})
    trainer.train()
    assert trainer.masks.digest() == before.digest()
    assert trainer.steps[-1].achieved == pytest.approx(0.8, abs=1e-4)


def test_zeros_from_before_stay_zero_under_another_pattern(tmp_path):
    model = tiny_vit()
    before = hfprune.prune(model, hfprune.PruningConfig(target=0.8)).masks
    trainer = make_trainer(tmp_path, model, pruning={"target": None, "granularity": "2:4", "schedule": "one_shot"})
    trainer.train()
    assert all(bool((trainer.masks.kept[name] <= kept).all()) for name, kept in before.kept.items())


def test_the_best_checkpoint_is_loaded_and_kept_as_in_trainer(tmp_path):
    trainer = PruningTrainer(
        model=tiny_vit(),
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, num_train_epochs=4, learning_rate=0.3, optim="sgd", eval_strategy="epoch",
            save_strategy="epoch", save_total_limit=1, load_best_model_at_end=True, report_to="none",
        ),
        train_dataset=Digits(0, 64),
        eval_dataset=Digits(1000, 1064),
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{8 * (1 + losses.index(min(losses)))}")


@pytest.mark.parametrize(
    ("name", "grows"),
    [("perplexity", False), ("wer", False), ("rmse", False), ("brier_score", False), ("eval_loss", False)]
    + [("answer_f1", True), ("certainty", True), ("accuracy", True)],
)
def test_the_direction_of_a_metric(tmp_path, name, grows):
    by_argument = make_trainer(tmp_path, metric_for_best_model=name)
    by_monitor = make_trainer(tmp_path, pruning={"recovery": {"epochs": 1, "monitor": name}})
    assert by_argument.recovery.greater_is_better is by_monitor.recovery.greater_is_better is grows


def test_a_metric_that_is_not_a_number_is_never_the_best(tmp_path):
    trainer = make_trainer(
        tmp_path, pruning={"schedule": "one_shot", "recovery": {"epochs": 2, "patience": 3, "monitor": "accuracy"}}
    )
    Scripted([float("nan"), 0.2, 0.1]).attach(trainer)
    trainer.train()
    assert trainer.steps[0].metric["accuracy"] == 0.2


def test_a_gradual_schedule_that_ends_early_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= 4

    schedule = {"kind": "cubic", "steps": 3, "every": 3}
    trainer = make_trainer(tmp_path, pruning={"schedule": schedule, "recovery": {"epochs": 4}}, callbacks=[Stop()])
    with pytest.warns(UserWarning, match="before the schedule reached 80.0%"):
        trainer.train()


def test_a_plain_module_trains_and_loads_again(tmp_path):
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path / "run", PlainNet(), pruning={"criterion": "taylor", "recovery": {"epochs": 6}})
    trainer.train()
    assert trainer.steps[-1].metric["accuracy"] > 0.5
    assert zeros_held(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = hfprune.from_pretrained(tmp_path / "saved", model=PlainNet)
    images = Digits(0, 8).images
    assert torch.equal(loaded(images), trainer.model.eval()(images))


def test_saved_models_load_bit_identical_and_hold_nothing_pickled(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not [p.name for p in (tmp_path / "saved").iterdir() if p.suffix not in (".json", ".safetensors")]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    images = Digits(0, 8).images
    assert torch.equal(loaded.eval()(images).logits, trainer.model.eval()(images).logits)
    assert hfprune.verify(tmp_path / "saved").zeros == trainer.masks.zeros
    done = loaded.config.hfprune["pruning"]
    assert (done["criterion"], done["target"]["ratio"]) == ("l1", 0.8)


def test_a_pruned_model_goes_on_from_its_masks(tmp_path):
    first = make_trainer(tmp_path / "a", pruning={"target": 0.4, "schedule": "one_shot"})
    first.train()
    first.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    second = make_trainer(tmp_path / "b", loaded)
    assert second.masks.digest() == first.masks.digest()
    second.train()
    assert all(bool((second.masks.kept[name] <= kept).all()) for name, kept in first.masks.kept.items())


def test_the_arguments_given_are_not_changed(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=3, report_to="none", disable_tqdm=True)
    before = arguments.to_dict()
    PruningTrainer(
        model=PlainNet(), args=arguments, train_dataset=Digits(0, 32), eval_dataset=Digits(0, 32),
        compute_metrics=accuracy, pruning={"target": 0.5},
    ).train()  # fmt: skip
    assert arguments.to_dict() == before


def test_without_recovery_settings_a_phase_lasts_as_the_arguments_say(tmp_path):
    trainer = make_trainer(tmp_path, pruning={"recovery": {}}, max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 6


def test_no_training_between_steps(tmp_path):
    trainer = make_trainer(tmp_path, pruning={"recovery": {"epochs": 0}})
    trainer.train()
    assert trainer.state.global_step == 0
    assert trainer.masks.zeros == round(0.8 * trainer.pruner.total_units)


def test_without_pruning_it_is_a_trainer(tmp_path):
    trainer = PruningTrainer(
        model=tiny_vit(), args=TrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, report_to="none"),
        train_dataset=Digits(0, 32),
    )  # fmt: skip
    assert trainer.train().global_step == 2
    assert trainer.steps == []


def test_state_in_every_checkpoint_is_plain_json(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        state = json.loads((checkpoint / "pruning_state.json").read_text())
        assert state["format_version"] == 1
        assert not (checkpoint / "training_args.bin").exists()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4


BAD = [
    (
        {"recovery": {"patience": 2}},
        {"eval_dataset": None},
        ConfigError,
        "recovery.patience: needs an eval_dataset",
    ),
    ({"criterion": "tailor"}, {}, ConfigError, "pruning.criterion: unknown criterion 'tailor'; did you mean 'taylor'?"),
    ({"ignore": ["classifer"]}, {}, ConfigError, "did you mean 'classifier'?"),
    (
        {"schedule": {"kind": "cubic", "steps": 4, "every": 10}},
        {},
        ConfigError,
        r"pruning.schedule.every: 10 can't reach the target.* training has 8; use every: 1",
    ),
]


@pytest.mark.parametrize(("pruning", "options", "error", "message"), BAD)
def test_bad_input_is_refused_before_training(tmp_path, pruning, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, pruning=pruning, **options)


def test_an_unmeasured_monitor_is_named_with_the_nearest(tmp_path):
    trainer = make_trainer(tmp_path, pruning={"recovery": {"epochs": 1, "monitor": "acuracy"}})
    with pytest.raises(ConfigError, match="recovery.monitor: 'acuracy' is not measured; did you mean 'accuracy'"):
        trainer.train()


def test_of_several_evaluation_sets_the_recipe_names_the_one_to_watch(tmp_path):
    sets = {"easy": Digits(1000, 1064), "hard": Digits(1100, 1164)}
    line = "monitor: 'loss' is measured on each of easy, hard; name the one to watch, e.g. easy_loss"
    with pytest.raises(ConfigError, match=line):
        make_trainer(tmp_path, eval_dataset=sets)
    one = make_trainer(tmp_path, eval_dataset={"easy": sets["easy"]})
    assert one.recovery.monitor == "eval_easy_loss"
    named = make_trainer(tmp_path, eval_dataset=sets, pruning={"recovery": {"epochs": 1, "monitor": "hard_accuracy"}})
    named.train()
    assert {"easy_accuracy", "hard_accuracy"} <= set(named.steps[-1].metric)


def test_a_loss_that_is_not_a_number_stops_before_it_reaches_a_weight(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0.1, save_strategy="no")
    before = {}

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            if state.global_step == 3:
                before.update({name: value.clone() for name, value in model.state_dict().items()})
                for row in trainer.train_dataset.images:
                    row.fill_(float("nan"))

    trainer.add_callback(Poison())
    with pytest.raises(TrainingDiverged, match="training.learning_rate: the loss became nan .* try 0.01 in phase 1"):
        trainer.train()
    # The batch that was fetched already is clean; the step after it is not.
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint to resume from"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
