"""The job: from a spec to a sealed dump. The loop that ties plan, engine and store together.

torch and transformers are imported inside functions, because an up-to-date answer needs neither.
"""

from actdump.job.bound import bind, modules
from actdump.job.forecast import Forecast, forecast
from actdump.job.loop import Outcome, run
from actdump.job.standing import Explanation, explain
from actdump.job.underway import abandoned

__all__ = [
    "Explanation",
    "Forecast",
    "Outcome",
    "abandoned",
    "bind",
    "explain",
    "forecast",
    "modules",
    "run",
]
