"""All scenarios."""

from __future__ import annotations

from tests.differential import scenarios_claims, scenarios_keys, scenarios_options, scenarios_results

SCENARIOS = (
    *scenarios_keys.SCENARIOS,
    *scenarios_results.SCENARIOS,
    *scenarios_claims.SCENARIOS,
    *scenarios_options.SCENARIOS,
)
