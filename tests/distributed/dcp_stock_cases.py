"""The program that the ranks of `test_dcp_stock_cases.py` run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.distributed import dcp_async_cases, dcp_fault_cases, dcp_model_cases, dcp_tensor_cases
from tests.distributed.dcp_doors import beside_hugging_face, through_both
from tests.distributed.in_turn import main

SCENARIOS: dict[str, Callable[[Path], None]] = {
    **through_both(*dcp_tensor_cases.CASES, *dcp_model_cases.CASES, *dcp_async_cases.CASES),
    **beside_hugging_face(*dcp_tensor_cases.CASES_OF_SAFETENSORS),
    **{scenario.__name__: scenario for scenario in (*dcp_tensor_cases.OWN_CASES, *dcp_fault_cases.CASES)},
}

if __name__ == "__main__":
    main(SCENARIOS)
