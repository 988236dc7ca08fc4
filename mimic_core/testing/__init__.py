"""The conformance kit: is an adapter right? and tiny models to ask of."""

from .check import LAWS, Law, check_adapter, pytest_cases
from .report import Report, Row
from .tiny import TinyModel, tiny

__all__ = ["LAWS", "Law", "Report", "Row", "TinyModel", "check_adapter", "pytest_cases", "tiny"]
