"""A strategy with options, as it is given on the command line."""

from __future__ import annotations

import dataclasses

import pytest

from comp_edge.errors import InputError
from comp_edge.options import option_kinds, parse_method, with_options
from comp_edge.settings import PruneConfig

BASE = PruneConfig(total_steps=100)


def test_a_label_changes_what_it_names_and_nothing_else() -> None:
    method = parse_method(
        "comp:cip=no,stages=24,explore=0,lr=1e-3,muon=none,modes=vision_params+vision_tokens", base=BASE
    )
    assert method.strategy == "comp" and method.label.startswith("comp:cip=no")
    expected = dataclasses.replace(
        BASE, cip=False, stages=24, lr=1e-3, muon=None, modes=("vision_params", "vision_tokens"),
        mps=dataclasses.replace(BASE.mps, explore=0.0),
    )  # fmt: skip
    assert method.config == expected and type(method.config.mps.explore) is float
    assert parse_method("probe", base=expected).config == expected


def test_other_stages_share_the_same_steps() -> None:
    """Unless somebody says what each of them takes."""
    base = PruneConfig().sharing(300)
    for stages, each in ((8, 6), (16, 3), (32, 1)):
        assert parse_method(f"comp:stages={stages}", base=base).config == dataclasses.replace(
            base, stages=stages, stage_steps=each
        )
    assert parse_method("comp:stages=8,stage_steps=2", base=base).config.stage_steps == 2
    assert parse_method("comp:stages=8", base=dataclasses.replace(base, stage_steps=2)).config.stage_steps == 2
    assert parse_method("comp:stages=8", base=PruneConfig()).config == PruneConfig(stages=8)


def test_every_option_of_the_configuration_can_be_given() -> None:
    """Also those that will be added: a type that the parser does not know fails here."""
    defaults = {**vars(BASE), **vars(BASE.mps)}
    assert set(option_kinds()) == set(defaults) - {"mps", "total_steps", "final_steps"}
    for name in option_kinds():
        value = defaults[name]
        text = "none" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
        assert with_options(BASE, f"{name}={text}", where="here") == BASE
        with pytest.raises(InputError, match=f"'here' gives '{name}' as '\\+'; it takes "):
            with_options(BASE, f"{name}=+", where="here")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("best", "unknown strategy 'best'; give one of params, tokens, joint, comp, probe"),
        ("comp:cop=no", "'comp:cop=no' has unknown option 'cop'; options are stages, "),
        ("comp:total_steps=4", "unknown option 'total_steps'"),
        ("comp:stages=4.5", "'comp:stages=4.5' gives 'stages' as '4.5'; it takes an integer"),
        ("comp:history=much", "gives 'history' as 'much'; it takes a number"),
        ("comp:lr=nan", "gives 'lr' as 'nan'; it takes a number"),
        ("comp:token_norm=max", "gives 'token_norm' as 'max'; it takes sum, mean, minmax or rank"),
        ("comp:muon=maybe", "gives 'muon' as 'maybe'; it takes yes, no or none"),
        ("comp:cip", "gives 'cip' as ''"),
        ("comp:stages=4,stages=5", "gives 'stages' twice"),
        ("comp:stages=0", "stages 0: give 1 or more."),
        ("comp:horizon=0", "horizon 0: give 1 or more."),
        ("comp:temperature=0", "temperature 0.0: give a number above 0."),
        ("comp:explore=1.5", "explore 1.5: give a number from 0 to 1."),
        ("comp:lr=-1", "lr -1.0: give a number above 0."),
        ("probe:calibration_batches=0", "calibration_batches 0: give 1 or more."),
        ("probe:stage_share=1.5", "stage_share 1.5: give at most 1"),
    ],
)
def test_options_that_are_refused(label: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_method(label, base=BASE)
    assert message in str(error.value)
