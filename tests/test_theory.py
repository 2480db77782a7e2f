"""Training comes to what the closed form says, and would not if the objective were another."""

import pytest
from PIL import Image

from recipes import theory_amvl
from recipes.theory_amvl import TheoryArguments, closed_form, largest_difference, train
from trainer.objective import gaussian_kl, reduce_kl


pytestmark = pytest.mark.any_release


QUICK = {"num_steps": 900, "batch_size": 2048}


def difference(arguments):
    (gamma,) = arguments.gammas
    measured, closed = train(arguments, gamma), closed_form(arguments, gamma)
    return largest_difference([{"measured": measured, "closed": closed}])


@pytest.mark.parametrize(
    "world",
    [
        {"gammas": [1.0]},
        {"gammas": [1.0], "beta": 0.1},  # beta makes no difference
        {"gammas": [0.5], "residual": 1.5, "noise": 0.8, "slope": -0.4},
        {"gammas": [5.0]},  # nothing leaks
    ],
    ids=str,
)
def test_training_comes_to_the_closed_form(world):
    assert difference(TheoryArguments(**world, **QUICK)) < 0.02


def test_without_stop_gradients_it_would_come_to_something_else(monkeypatch):
    def leaking(ntp, prior, posterior, beta, gamma):
        kl = beta * gaussian_kl(*posterior, *prior) + gamma * gaussian_kl(*prior, *posterior)
        return ntp + reduce_kl(kl, "mean"), {}

    monkeypatch.setattr(theory_amvl, "amvl_loss", leaking)
    assert difference(TheoryArguments(gammas=[1.0], **QUICK)) > 0.1


def test_the_closed_form_by_hand():
    arguments = TheoryArguments(slope=0.7, residual=1.0, noise=0.5)
    assert closed_form(arguments, 1.0) == pytest.approx(
        {"leak": 1.0, "mean": 0.7, "variance": 2.0, "error_posterior": 0.5, "error_prior": 1.5}
    )
    assert closed_form(arguments, 4.0)["leak"] == 0 < closed_form(arguments, 3.99)["leak"]


def test_the_command_prints_and_draws(tmp_path, capsys):
    arguments = TheoryArguments(output_dir=str(tmp_path), gammas=[0.5, 5.0], num_steps=30, batch_size=64)
    theory_amvl.main(arguments)
    printed = capsys.readouterr().out
    assert "Trained / closed form" in printed and "Largest difference" in printed
    assert "| gamma |" in (tmp_path / "theory.md").read_text()
    assert Image.open(tmp_path / "theory.png").width > 500


@pytest.mark.parametrize(
    "setting", [{"gammas": [0.0]}, {"gammas": []}, {"noise": 0.0}, {"num_steps": 0}, {"beta": -1.0}]
)
def test_a_world_without_a_closed_form_is_refused(setting):
    with pytest.raises(ValueError, match=f"`{[*setting][0]}` must be above 0"):
        TheoryArguments(**setting)
