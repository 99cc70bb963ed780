"""The job: from a spec to a sealed dump. The loop that ties plan, engine and store together.

torch and transformers are imported inside functions, because an up-to-date answer needs neither.
"""

from actdump.job.bound import Bound, bind, modules, survey
from actdump.job.forecast import Forecast, forecast
from actdump.job.loop import Outcome, run
from actdump.job.standing import Explanation, explain
from actdump.job.underway import abandoned
from actdump.job.watching import Watcher

__all__ = [
    "Bound",
    "Explanation",
    "Forecast",
    "Outcome",
    "Watcher",
    "abandoned",
    "bind",
    "explain",
    "forecast",
    "modules",
    "run",
    "survey",
]
