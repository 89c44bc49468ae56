"""Recipes of speech recognition from end to end, with tiny models and tones for letters."""

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

from hfprune import Recipe
from hfprune.analysis.setting import open_setting
from hfprune.errors import ConfigError, ModelError, NotReachable
from hfprune.pipeline import prepare_run, run
from hfprune.speech.audio import read_audio
from hfprune.speech.recognisers import generated
from tests.speech.sounds import record

CTC = {"hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 2, "channels": 16, "letters": "abc"}
WHISPER = {"hidden_size": 32, "intermediate_size": 48, "encoder_layers": 1, "decoder_layers": 1, "heads": 2,
           "mel_bins": 16, "seconds": 1, "longest_text": 8}  # fmt: skip
MODELS = {"small_wav2vec2": CTC, "small_whisper": WHISPER}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    record(folder / "train", 24)
    record(folder / "test", 6, seed=1)
    return folder


def recipe(sounds, folder, kind="small_wav2vec2", **sections):
    values = {
        "model": {"name": f"hfprune.scratch_speech:{kind}", "args": MODELS[kind]},
        "data": {"name": str(sounds), "task": "speech-recognition", "language": "en", "metrics": ["wer", "cer"]},
        "pruning": {"criterion": "l1", "granularity": "weight", "target": 0.5, "recovery": {"epochs": 1}},
        "training": {
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 4,
            "learning_rate": 3e-3,
            "seed": 0,
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "output": {"folder": str(folder), "batch_sizes": [1]},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Recipe.parse(values)


def quietly(wanted, **options):
    with open("/dev/null", "w") as nowhere:
        return run(wanted, console=Console(file=nowhere), **options)


def test_a_ctc_model_learns_and_is_pruned(sounds, tmp_path):
    """From nothing to a card: it learns its letters, and the pruned one is transcribed with as others are."""
    folder = tmp_path / "run"
    report = quietly(recipe(sounds, folder, baseline={"epochs": 30}))
    assert report["main_metric"] == "wer" and report["greater_is_better"] is False
    assert report["dense"]["metric"]["cer"] < 0.5
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: automatic-speech-recognition" in card and "| wer |" in card
    assert 'AutoProcessor.from_pretrained("run")' in card and "AutoModelForCTC" in card
    assert (folder / "trajectory.png").is_file()
    sound = sorted((sounds / "test").glob("*.wav"))[0]
    heard = pipeline("automatic-speech-recognition", model=str(folder))(
        {"raw": read_audio(sound), "sampling_rate": 16_000}
    )
    assert set(heard["text"]) <= set("abc ")
    setting = open_setting(None, folder / "recipe.yaml", overrides=[f"model.name={json.dumps(str(folder))}",
                                                                    "model.args={}"])  # fmt: skip
    assert setting.evaluate(setting.model)["wer"] == pytest.approx(report["pruned"]["metric"]["wer"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "pruning",
    [
        {"granularity": ["head", "neuron"], "criterion": "taylor", "target": 0.5},
        {"granularity": "rank", "criterion": "whitening", "target": 0.5},
    ],
    ids=["units", "rank"],
)
def test_units_and_ranks_go_and_what_is_left_loads_again(model, pruning, sounds, tmp_path):
    report = quietly(recipe(sounds, tmp_path / "run", model, pruning=pruning))
    assert report["pruned"]["params"] < report["dense"]["params"]
    assert set(report["pruned"]["metric"]) >= {"wer", "cer"}
    auto = AutoModelForCTC if model == "small_wav2vec2" else AutoModelForSpeechSeq2Seq
    again, processor = auto.from_pretrained(tmp_path / "run"), AutoProcessor.from_pretrained(tmp_path / "run")
    assert sum(p.numel() for p in again.parameters()) == report["pruned"]["params"]
    inputs = processor(torch.zeros(16_000).numpy(), sampling_rate=16_000, return_tensors="pt")
    if model == "small_whisper":
        assert generated(again, inputs).shape[1] <= WHISPER["longest_text"]
    else:
        assert torch.isfinite(again(**inputs).logits).all()


def test_whisper_is_judged_by_what_it_generates(sounds, tmp_path):
    job = prepare_run(recipe(sounds, tmp_path / "run", "small_whisper", training={"generation_max_length": 4}))
    seen = []
    job.trainer.compute_metrics = lambda answers: seen.append(answers) or {"wer": 1.0}
    job.trainer.evaluate()
    tokens = seen[0].predictions
    assert tokens.ndim == 2 and tokens.shape[1] <= 4 + 2 and tokens.dtype.kind == "i"
    assert seen[0].label_ids.shape[0] == 6


def test_an_interrupted_run_goes_on(sounds, tmp_path):
    wanted = {"pruning": {"schedule": {"kind": "constant", "steps": 2}}}
    whole = quietly(recipe(sounds, tmp_path / "whole", **wanted))
    folder = tmp_path / "parted"
    quietly(recipe(sounds, folder, **wanted))
    for name in ("config.json", "pruning_report.json", "model.safetensors"):
        (folder / name).unlink()
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    again = quietly(recipe(sounds, folder, **wanted), resume=True)
    assert again["pruned"]["metric"] == whole["pruned"]["metric"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"training": {"generation_max_lenght": 4}},
            r"training\.generation_max_lenght: .*did you mean 'generation_max",
        ),
        ({"training": {"predict_with_generate": False}}, r"training\.predict_with_generate: False leaves the metrics"),
        ({"training": {"generation_num_beams": 0}}, r"training\.generation_num_beams: must be at least 1"),
        ({"data": {"metrics": ["perplexity"]}}, r"data\.metrics: 'perplexity' is no metric for speech-recognition"),
        ({"data": {"language": "english!"}}, r"data\.language: "),
        ({"data": {"max_seconds": 0}}, r"data\.max_seconds: "),
    ],
)
def test_one_line_names_the_key(sections, words, sounds, tmp_path):
    with pytest.raises(ConfigError, match=words):
        prepare_run(recipe(sounds, tmp_path / "run", **sections))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_no_recogniser(sounds, tmp_path):
    wanted = {"model": {"name": "hfprune.scratch:small_llama", "args": {"layers": 1, "vocabulary": 300}}}
    with pytest.raises(ModelError, match="LlamaForCausalLM is no recogniser"):
        prepare_run(recipe(sounds, tmp_path / "run", **wanted))
    from hfprune.scratch import small_llama

    model, tokenizer = small_llama(layers=1, vocabulary=300)
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match="is a llama model, which is no recogniser"):
        prepare_run(recipe(sounds, tmp_path / "run", model={"name": str(tmp_path / "llama"), "args": {}}))


def test_a_recogniser_without_its_processor(sounds, tmp_path):
    from hfprune.scratch_speech import small_wav2vec2

    model, processor = small_wav2vec2(**CTC)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"model\.name: '.*model' has no (readable )?processor"):
        prepare_run(recipe(sounds, tmp_path / "run", model={"name": str(tmp_path / "model"), "args": {}}))
    processor.save_pretrained(tmp_path / "model")
    job = prepare_run(recipe(sounds, tmp_path / "run", model={"name": str(tmp_path / "model"), "args": {}}))
    assert type(job.model) is type(model)


@pytest.mark.parametrize("name", ["whisper_heads_neurons", "wav2vec2_structured"])
def test_recipes_for_the_hub_end_in_one_line_without_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotReachable) as caught:
        prepare_run(Recipe.from_yaml(f"recipes/{name}.yaml", [f"output.folder={tmp_path}/run", "training.bf16=false"]))
    assert "\n" not in str(caught.value)
