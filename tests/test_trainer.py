"""A trainer goes on from its own state, and takes no other."""

import copy

import pytest
import torch
from helpers.tiny import tiny_model

from config import TrainConfig
from trainer import Trainer
from util.files import UserError


@pytest.fixture(scope="module")
def state():
    """Return the state of a tiny run after one step."""
    trainer = Trainer(tiny_model(), TrainConfig(ema=0.5), 6)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer.finish_step(3)
    return trainer.state()


def load(state, config=None) -> Trainer:
    trainer = Trainer(tiny_model(seed=1), config or TrainConfig(ema=0.5), 6)
    trainer.load(state)
    return trainer


def test_a_state_is_taken_whole_but_for_the_flags_of_the_optimiser(state):
    loaded = load(state, TrainConfig(ema=0.5, lr=0.25, weight_decay=0.125))
    again = loaded.state()
    for part in ("weights", "average"):
        assert all(torch.equal(again[part][name], each) for name, each in state[part].items())
    assert again["step_number"] == 1 and again["words"] == 3
    assert {group["peak"] for group in loaded.optimizer.param_groups} == {0.25}
    assert {group["weight_decay"] for group in loaded.optimizer.param_groups} == {0.125, 0.0}


def first(tensors: dict) -> str:
    return next(name for name, each in tensors.items() if each.is_floating_point())


DAMAGE = {
    "another shape": lambda s: s["weights"].update({first(s["weights"]): torch.zeros(2, 2)}),
    "another type": lambda s: s["average"].update(
        {first(s["average"]): s["average"][first(s["average"])].double()}
    ),
    "NaN": lambda s: s["weights"][first(s["weights"])].fill_(float("nan")),
    "infinity": lambda s: s["average"][first(s["average"])].fill_(float("inf")),
    "moments of another shape": lambda s: s["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(1, 1)
    ),
    "moments that are gone": lambda s: s["optimizer"]["state"][0].pop("exp_avg_sq"),
    "moments of another kind": lambda s: s["optimizer"]["state"].update({0: [1, 2]}),
    "no groups": lambda s: s["optimizer"].pop("param_groups"),
    "fewer groups": lambda s: s["optimizer"]["param_groups"].pop(),
    "groups of another kind": lambda s: s["optimizer"].update(param_groups="none"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_state_of_another_run_is_one_line(what, state):
    damaged = copy.deepcopy(state)
    DAMAGE[what](damaged)
    with pytest.raises(UserError) as error:
        load(damaged)
    assert "last.pt is damaged, or not of this run" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_no_number_of_the_optimiser_comes_from_the_file(state):
    strange = copy.deepcopy(state)
    for group in strange["optimizer"]["param_groups"]:
        group |= {"betas": ("a", "b"), "eps": None, "lr": "fast", "fused": "yes"}
    loaded = load(strange)
    assert {group["betas"] for group in loaded.optimizer.param_groups} == {(0.9, 0.98)}
    assert {group["eps"] for group in loaded.optimizer.param_groups} == {1e-8}
