"""Validation on the same documents each time, for every optimizer: with TITAN_ADAM_MINI_SAME_VALIDATION=1.

torchtitan's validator reads on where it stopped the last time: losses of two steps are then over different documents,
a run that was started again validates on others than one that was not, and with ``validation.steps = -1`` a data set
that is not streamed is empty from the second time on. Without the variable nothing changes.
"""

from typing import Any

import torchtitan.components.validate as titan_validate

from titan_adam_mini.titan.switch import switched_on

_VARIABLE = "TITAN_ADAM_MINI_SAME_VALIDATION"

_MARK = "titan_adam_mini_wraps"
_found = titan_validate.Validator
original: Any = getattr(_found, _MARK, _found)


class Validator(original):
    """torchtitan's; with the variable, every validation begins where the first one did."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start = self.validation_dataloader.state_dict() if _wanted() else None

    def validate(self, model_parts: list[Any], step: int) -> None:
        """As torchtitan's."""
        if self._start is not None:
            self.validation_dataloader.load_state_dict(self._start)
        super().validate(model_parts, step)


setattr(Validator, _MARK, original)


def _wanted() -> bool:
    return switched_on(_VARIABLE, "the same documents each time")
