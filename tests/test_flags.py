"""Numbers that make no sense, in every flag that takes one: one line that names flag and value."""

import dataclasses
import math
import typing

import pytest
from helpers.tiny import SMALL, run_script

import app
import config
import evaluate
import inference
import train

CONFIGS = (config.Config, inference.Config, evaluate.Config, app.Config)
# Where such a number means something: as many as there are, without an end, no limit.
SENSIBLE = {
    **dict.fromkeys(["seed", "split_seed"], (-1, 10**31)),
    **dict.fromkeys(["limit", "epochs", "scst_epochs", "patience", "min_count", "batch_size",
                     "accumulate", "top_k", "no_repeat_ngram", "max_words", "weight_decay",
                     "scst_bleu", "attention_penalty", "at_once", "grid", "min_words", "d_model",
                     "fc_dim"], (10**31,)),
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
            if hasattr(made, "validate"):
                made.validate()
            if config is app.Config:
                app.check(made)
            if hasattr(made, "validate"):
                made.validate()
        said = str(error.value).replace("-", " ").replace("_", " ")
        assert name.replace("_", " ") in said and "\n" not in said


def test_flags_of_all_scripts_are_looked_at():
    names = {name for _, name, _ in FLAGS}
    assert {"lr", "beam_size", "port", "limit", "views", "img_size", "d_model"} <= names
    assert len(FLAGS) > 40


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--lr", "1e38"], "--lr 1e+38 must be above 0 and at most 1e+30"),
     (["--lr", "1e400"], "--lr inf must be above 0"), (["--lr", "nan"], "--lr nan must be above 0"),
     (["--lr", "-1"], "--lr -1.0 must be above 0"), (["--lr", ""], "--lr"),
     (["--lr", "1e-310", "--scst-epochs", "1"], "it is the CNN's learning rate"),
     (["--scst-samples", "1" + "0" * 30], "must be at most 1,000"),
     (["--views", "1" + "0" * 30], "must be at most 1,000"),
     (["--epochs", "1" * 5000], "--epochs"), (["--weight-decay", "nan"], "must be")],
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
