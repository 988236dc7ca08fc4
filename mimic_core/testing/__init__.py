"""The conformance kit: it checks whether an adapter is right."""

from .check import LAWS, Law, check_adapter, pytest_cases
from .report import Report, Row

__all__ = ["LAWS", "Law", "Report", "Row", "check_adapter", "pytest_cases"]
