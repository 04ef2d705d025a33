"""Budgets: targets, and what is refused."""

from __future__ import annotations

import math

import pytest

from comp_edge.budget import Budget
from comp_edge.cost import Cost, MacsCost
from comp_edge.errors import InputError


class Milliseconds:
    """A cost model that a device could have given."""

    name = "pixel"

    def predict(self, plan):
        return 10.0


def test_targets():
    assert Budget(macs=0.3).target(200.0) == pytest.approx(60.0)
    assert Budget(speedup=4.0).target(200.0) == pytest.approx(50.0)
    assert Budget(speedup=2.0, cost=Milliseconds()).target(30.0) == pytest.approx(15.0)
    assert Budget(latency_ms=12.5, cost=Milliseconds()).target(200.0) == 12.5


def test_the_cost_behind_a_budget(make_model):
    model = make_model(vision_layers=1, language_layers=1)
    default = Budget(macs=0.3, decode_tokens=3).cost_model(model)
    assert isinstance(default, MacsCost) and default.decode_tokens == 3
    cost = Milliseconds()
    assert isinstance(cost, Cost) and Budget(speedup=2.0, cost=cost).cost_model(model) is cost


def test_what_the_plan_records():
    assert Budget(macs=0.3).to_json() == {"macs": 0.3, "decode_tokens": 0}
    assert Budget(latency_ms=9.0, cost=Milliseconds()).to_json() == {"latency_ms": 9.0, "decode_tokens": 0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "exactly one of macs, latency_ms and speedup, got none"),
        ({"macs": 0.3, "speedup": 2.0}, "exactly one.*macs.*speedup"),
        ({"macs": 0.0}, "between 0 and 1, got 0.0"),
        ({"macs": 1.0}, "between 0 and 1, got 1.0"),
        ({"macs": -0.3}, "between 0 and 1, got -0.3"),
        ({"macs": 30}, "between 0 and 1, got 30"),
        ({"macs": math.nan}, "between 0 and 1, got nan"),
        ({"macs": 0.3, "cost": Milliseconds()}, "macs takes no cost model"),
        ({"speedup": 1.0}, "above 1, got 1.0"),
        ({"speedup": 0.5}, "above 1, got 0.5"),
        ({"speedup": math.nan}, "above 1, got nan"),
        ({"latency_ms": 40.0}, "needs a cost model, got 40.0"),
        ({"latency_ms": 0.0, "cost": Milliseconds()}, "positive.*got 0.0"),
        ({"latency_ms": math.nan, "cost": Milliseconds()}, "positive.*got nan"),
        ({"macs": 0.3, "decode_tokens": -1}, "must not be negative, got -1"),
        ({"speedup": 2.0, "cost": object()}, "name and predict.*got object"),
    ],
)
def test_impossible_budgets(arguments, says):
    with pytest.raises(InputError, match=says) as caught:
        Budget(**arguments)
    assert "\n" not in str(caught.value)
