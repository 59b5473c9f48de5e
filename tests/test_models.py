"""Every classification model trains as the equation says, with the layer that a person would name."""

import pytest
import torchvision
from model_zoo import CASES, TABLE, check, prepare, reshape_name

from cgc_reg import CGCRegularizer

SMALL = [case for case in CASES if case.small]


def named(cases):
    return [pytest.param(case, id=f"{case.source}: {case.name}") for case in cases]


@pytest.mark.parametrize("case", named(SMALL))
def test_step_is_the_slow_one(case):
    assert check(case).problems == []


@pytest.mark.parametrize("case", named(case for case in SMALL if case.reshape))
def test_transformer_without_reshape_transform_is_told_which_to_pass(case):
    model, x = prepare(case)
    with pytest.raises(ValueError, match=f"reshape_transform={reshape_name(case)}"):
        CGCRegularizer(case.layer).compute(model, x)


def test_no_classifier_of_torchvision_up_to_60_million_parameters_is_left_out():
    models = torchvision.models
    sizes = {
        name: models.get_model_weights(name).DEFAULT.meta["num_params"] for name in models.list_models(module=models)
    }
    assert {name for name, size in sizes.items() if size <= 60e6} <= {case.name for case in CASES}


def test_table_holds_every_model_with_its_layer_and_no_failure():
    text = TABLE.read_text()
    rows = [[cell.strip() for cell in row.split("|")] for row in text.splitlines() if row.startswith("| ")]
    table = {(row[1], row[5].split(",")[0].strip("`")) for row in rows}
    assert {(case.name, case.layer) for case in CASES} <= table
    assert "not so" not in text
