"""A run log in, a page for people out: `write_summary` reads `runs/<name>/`; no torch import."""

from fastmon.report.runlog import RunLog, read_run
from fastmon.report.summary import write_summary

__all__ = ["RunLog", "read_run", "write_summary"]
