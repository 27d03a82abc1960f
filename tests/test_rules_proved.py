"""Every registered rule keeps what it promises."""

import pytest

from jaxinfer.rewrites import DERIVATIVE_RULES, FINAL_DERIVATIVE_RULES, RULES
from jaxinfer.rewriting.prove import prove
from jaxinfer.rewriting.rule import check_names

EVERY = tuple(dict.fromkeys((*RULES, *DERIVATIVE_RULES, *FINAL_DERIVATIVE_RULES)))
BY_NAME = {rule.name: rule for rule in EVERY}


def test_names_are_unique():
    assert check_names(EVERY) == EVERY


@pytest.mark.parametrize("name", BY_NAME)
def test_rule_is_proved(name):
    proof = prove(BY_NAME[name])
    assert sum(proof.runs.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_rule_is_proved_on_more_programs(name):
    prove(BY_NAME[name], seed=1, trials=4)
