"""Flags: where their values come from, and one line for values that make no sense."""

import dataclasses
import json
import math
import typing

import pytest
from helpers.tiny import SMALL, run_script, tiny_model
from safetensors.torch import save_file

import app
import config as train_config
import evaluate
import features
import inference
import train
from config import configure, flatten, unflatten
from model_file import FORMAT
from util import files

CONFIGS = (train_config.Config, inference.Config, evaluate.Config, app.Config)
# Where such a number means something: as many as there are, without an end, no limit.
SENSIBLE = {
    **dict.fromkeys(["seed", "split_seed"], (-1, 10**31)),
    **dict.fromkeys(["min_words", "top_k", "no_repeat_ngram", "max_words", "weight_decay",
                     "scst_bleu", "attention_penalty", "at_once"], (10**31,)),
    "length_penalty": (-1,),
    "grad_clip": (10**31, math.inf),
}  # fmt: skip
# Refused where the first picture or its words are at hand: their own tests say so.
LATER = {"decoding": ("temperature", "top_p"), "inference": ("n", "batch_size", "workers")}


def numbers(config: type) -> list[tuple[type, str, type]]:
    """Return the flags of a configuration that take a number: class, name, int or float."""
    found, hints = [], typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        if dataclasses.is_dataclass(hints[field.name]):
            found += numbers(hints[field.name])
        elif kinds & {int, float}:
            found.append((config, field.name, float if float in kinds else int))
    return found


TRAINING = flatten(configure([]))
FLAGS = {each for config in CONFIGS for each in numbers(config)}


@pytest.mark.parametrize(
    ("config", "name", "kind"),
    sorted(FLAGS, key=lambda flag: (flag[0].__module__, *map(str, flag))),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_that_makes_no_sense_is_refused_by_its_flag(config, name, kind):
    for value in (-1, 10**31, *((math.nan, math.inf, -math.inf) if kind is float else ())):
        if value in SENSIBLE.get(name, ()) or name in LATER.get(config.__module__, ()):
            continue
        needed = {"images": ()} if config is inference.Config else {}
        with pytest.raises(ValueError) as error:
            made = config(**{name: value}, **needed)
            if config is app.Config:
                app.check(made)
            if name in TRAINING:
                train_config.validate(unflatten(TRAINING | {name: value}))
        said = str(error.value).replace("-", " ").replace("_", " ")
        assert name.replace("_", " ") in said and "\n" not in said


def test_flags_of_all_scripts_are_looked_at():
    names = {name for _, name, _ in FLAGS}
    assert {"lr", "beam_size", "port", "limit", "views", "img_size", "d_model"} <= names
    assert len(FLAGS) > 40


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--lr", "1e38"], "--lr 1e+38 must be above 0 and at most 1000"),
     (["--lr", "1e400"], "--lr inf must be above 0"), (["--lr", "nan"], "--lr nan must be above 0"),
     (["--lr", "-1"], "--lr -1.0 must be above 0"), (["--lr", ""], "--lr"),
     (["--lr", "1e-310", "--scst-epochs", "1"], "it is the CNN's learning rate"),
     (["--scst-samples", "1" + "0" * 30], "must be below 2^31"),
     (["--views", "1" + "0" * 30], "must be below 2^31"),
     (["--epochs", "1" * 5000], "--epochs"), (["--weight-decay", "nan"], "must be"),
     (["--limit", "0"], "--limit 0 must be at least 1"),
     (["--workers", "-1"], "--workers -1 must be at least 0"),
     (["--train-fraction", "0"], "--train-fraction 0.0 must be above 0 and at most 1"),
     (["--train-fraction", "1.5"], "at most 1"), (["--train-fraction", "nan"], "at most 1")],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)  # fmt: skip
def test_training_refuses_such_numbers_in_one_line(flags, said, tmp_path, capsys):
    code, _, err = run_script(train, *SMALL, "--output", tmp_path / "run", *flags, capsys=capsys)
    assert (
        code == 2
        and err.startswith("error: ")
        and err.count("\n") == 1
        and said in err.replace(", ", ",")
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [(inference, ["a.png", "--length-penalty", "1e30"], "must be between -100 and 100"),
     (inference, ["a.png", "--length-penalty", "nan"], "must be between -100 and 100"),
     (evaluate, ["--batch-size", "1" + "0" * 30], "must be at most 1,048,576"),
     (evaluate, ["--workers", "2000"], "must be at most 1,024"),
     (app, ["--max-mb", "inf"], "max mb inf must be above 0")],
)  # fmt: skip
def test_other_scripts_refuse_them_in_one_line(script, flags, said, capsys):
    code, _, err = run_script(script, *flags, capsys=capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err


# --- where a value comes from


def test_flags_win_over_the_preset_and_the_preset_over_the_dataset():
    flags = flatten(configure(["--dataset", "shapes", "--preset", "show-and-tell", "--d-model=8"]))
    assert (flags["cnn_backbone"], flags["decoder"]) == ("inception_v3", "lstm")  # the preset's
    assert flags["d_model"] == 8 and flags["fc_dim"] == 512
    assert (flags["cnn_weights"], flags["min_count"]) == ("none", 1)  # the dataset's


def test_a_preset_may_choose_the_dataset_and_a_flag_another():
    assert flatten(configure(["--preset", "cnn-rnn"]))["dataset"] == "coco"
    flags = flatten(configure(["--preset", "cnn-rnn", "--dataset", "shapes"]))
    assert (flags["dataset"], flags["grid"], flags["epochs"]) == ("shapes", 1, 6)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [([], ("--img-size 320", "--views 2", "--data-dir data/flickr8k", "--d-model 256")),
     (["--dataset", "coco"], ("--img-size 224", "--views 1", "--data-dir data/coco")),
     (["--preset", "show-and-tell"], ("--img-size 299", "--views 1", "--d-model 512")),
     (["--dataset=shapes"], ("--img-size 64", "--d-model 64", "--epochs 6", "--lr 0.003"))],
)  # fmt: skip
def test_help_shows_the_values_that_will_be_used(argv, shown, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        configure([*argv, "--help"])
    text = capsys.readouterr().out
    flags = flatten(configure(argv))
    for each in shown:
        flag, value = each.split()
        assert str(flags[flag[2:].replace("-", "_")]) == value
        after = text[text.index(f"{flag} ") :]
        assert f"(default: {value})" in after[: after.index("--", 5) + 600]


@pytest.fixture
def narrow(tmp_path):
    """Return the folder of a run whose sizes only fit together, and not with the defaults."""
    flags = flatten(configure(["--d-model", "20", "--n-head", "5"]))
    files.write_json(tmp_path / "config.json", flags)
    return tmp_path


def test_a_resumed_run_takes_its_own_values_again(narrow):
    flags = flatten(configure(["--resume", "--output", str(narrow), "--n-head", "5"]))
    assert (flags["d_model"], flags["n_head"]) == (20, 5)


def test_a_model_to_start_from_takes_its_own_values_again(tmp_path):
    model = tiny_model(words=["a"])
    model.save(tmp_path / "model.safetensors")  # 16 wide, 2 heads
    start = ["--dataset", "shapes", "--init-from", str(tmp_path / "model.safetensors")]
    assert flatten(configure([*start, "--n-head", "2"]))["d_model"] == 16
    with pytest.raises(ValueError, match=r"--d-model 32 differs from the 16 of .*keeps a model's"):
        configure([*start, "--d-model", "32"])


def test_every_identity_field_is_kept_by_a_resumed_run(narrow):
    for name, value in {"d_model": "40", "min_count": "2", "img_size": "224"}.items():
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=f"{flag} {value} differs from the run's"):
            configure(["--resume", "--output", str(narrow), flag, value])
    with pytest.raises(ValueError, match="--preset cnn-rnn differs from the run's resnet-transf"):
        configure(["--resume", "--output", str(narrow), "--preset", "cnn-rnn"])
    changed = configure(["--resume", "--output", str(narrow), "--lr", "0.1", "--batch-size", "8"])
    assert (changed.train.lr, changed.train.batch_size) == (0.1, 8)


def test_a_run_of_an_older_version_keeps_the_sizes_it_meant(tmp_path):
    flags = flatten(configure(["--preset", "show-and-tell"])) | {"img_size": None, "data_dir": None}
    files.write_json(tmp_path / "config.json", {**flags, "a_flag_of_then": 1})
    resumed = flatten(configure(["--resume", "--output", str(tmp_path)]))
    assert (resumed["img_size"], resumed["data_dir"]) == (299, "data/flickr8k")


# --- a config.json that is damaged, or a stranger's


WRONG = {
    "epochs": [math.inf, "10", 1.5, None, [10], True, {}],
    "lr": ["fast", None, [], True],
    "limit": ["all", 1.5, False],
    "augment": [1, "true", None],
    "cnn_backbone": [["tiny"], 3, "resnet18; ls", None],
    "decoder": [{}, "rnn"],
    "dataset": [["shapes"], "csv\x1b[2J"],
    "cache_dir": [3, None, "cache\x1b[2J"],
    "data_dir": [3, ["data"], "data\x9b2J"],
    "seed": ["zero", 0.5],
    "device": [0, None],
    "img_size": ["224", 224.0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_wrong_type_in_config_json_is_one_line(name, value, narrow, capsys):
    flags = files.read_json(narrow / "config.json")
    files.write_json(narrow / "config.json", {**flags, name: value})
    code, _, err = run_script(train, "--resume", "--output", narrow, capsys=capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "\x1b" not in err
    assert f"--{name.replace('_', '-')}" in err and "config.json has " in err


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 2**64), ("workers", 10**6), ("lr", math.nan), ("epochs", 10**40), ("warmup", -1)],
)
def test_a_number_out_of_range_in_config_json_is_one_line(name, value, narrow, capsys):
    flags = files.read_json(narrow / "config.json")
    files.write_json(narrow / "config.json", {**flags, name: value})
    code, _, err = run_script(train, "--resume", "--output", narrow, capsys=capsys)
    assert code == 2 and err.count("\n") == 1 and f"--{name} {value} must be" in err


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"architectures": ["Bert"], "epochs": 3}', '"epochs"', "[" * 10**5]
)
def test_a_config_json_of_another_program_is_one_line(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    code, _, err = run_script(train, "--resume", "--output", tmp_path, capsys=capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "config.json" in err and len(err) < 500


@pytest.mark.parametrize("model", [None, 3, [], {"d_model": "16"}, {"decoder": ["lstm"]}])
def test_a_model_to_start_from_without_sizes_is_one_line(model, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    header = {"format": json.dumps(FORMAT), "model": json.dumps(model), "vocabulary": "[]"}
    save_file({}, path, header)
    code, _, err = run_script(train, "--init-from", path, capsys=capsys)
    assert code == 2 and err.startswith(f"error: {path} ") and err.count("\n") == 1


def test_an_output_that_is_the_datasets_folder_is_refused(drawn):
    with pytest.raises(ValueError, match="is the folder of the dataset"):
        configure(["--dataset", "shapes", "--data-dir", f"{drawn}/.", "--output", str(drawn)])


# --- commands


def test_a_command_runs_only_from_the_command_line_and_with_its_flag(narrow, capsys):
    command = "pipe:touch owned; cat shards/{}"
    new = ["--dataset", "shards", "--data-dir", command]
    for script, more in ((train, []), (evaluate, []), (features, ["--shards", "x"])):
        code, _, err = run_script(script, *new, *more, capsys=capsys)
        assert code == 2 and "would run a command; add --allow-commands" in err
    allowed = flatten(configure([*new, "--allow-commands"]))
    assert (allowed["data_dir"], allowed["allow_commands"]) == (command, True)
    files.write_json(narrow / "config.json", allowed)  # as a stranger's
    resume = ["--resume", "--output", str(narrow)]
    for more in ([], ["--allow-commands"], ["--data-dir", command]):
        with pytest.raises(ValueError, match="command"):
            configure([*resume, *more])
    again = configure([*resume, "--data-dir", command, "--allow-commands"])
    assert again.data.data_dir == command
    assert not configure([*resume, "--data-dir", "shards"]).data.allow_commands


@pytest.mark.parametrize("command", ["PIPE:ls {}", "Pipe:ls {}"])
def test_a_command_by_another_spelling_is_one_too(command, narrow):
    flags = files.read_json(narrow / "config.json")
    files.write_json(narrow / "config.json", {**flags, "dataset": "shards", "data_dir": command})
    with pytest.raises(ValueError, match="may be a stranger's"):
        configure(["--resume", "--output", str(narrow)])
