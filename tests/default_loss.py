"""A setting of the loss that a run has by default, whichever that is: a number above 0 that may be 0.25 or 0.3."""

from __future__ import annotations

from trainers.run_config import RunConfig

LOSS_KEY = next(name for name in type(RunConfig().loss).model_fields if name != "kind")
