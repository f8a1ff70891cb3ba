"""Reports for reviews: who had access, whether everything is whole, how fast it comes back, how the keys stand."""

from medshard.reports.making import Reports
from medshard.reports.model import Bars, Report, Table

__all__ = ["Bars", "Report", "Reports", "Table"]
