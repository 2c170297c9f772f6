"""The feature "same_validation": validation on the same documents each time, for every optimizer.

torchtitan's validator continues where it stopped the last time: losses of two steps are then over different documents,
a resumed run validates on other documents than an uninterrupted one, and with ``validation.steps = -1`` a dataset that
is not streamed is empty from the second validation on.
"""

from typing import Any

import torchtitan.components.validate as titan_validate

from titan_adam_mini.titan.replaced import replace


def install() -> None:
    """Make torchtitan's Validator start every validation where the first one did."""
    replace(titan_validate.Validator, "__init__", init_with_position)
    replace(titan_validate.Validator, "validate", validate_from_position)


def init_with_position(original: Any, validator: Any, *args: Any, **kwargs: Any) -> None:
    """Wraps torchtitan's: stores the data position at which the first validation starts."""
    original(validator, *args, **kwargs)
    validator._first_position = validator.validation_dataloader.state_dict()


def validate_from_position(original: Any, validator: Any, model_parts: list[Any], step: int) -> None:
    """Wraps torchtitan's: restores that position first."""
    validator.validation_dataloader.load_state_dict(validator._first_position)
    original(validator, model_parts, step)
