"""Says how many trials each fault test made."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a test that counted its trials."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "trials":
                terminalreporter.write_line(f"{value:>6} trials  {report.nodeid}")
