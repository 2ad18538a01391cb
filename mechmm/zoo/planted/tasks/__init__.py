"""The tasks by name."""

from __future__ import annotations

from collections.abc import Mapping

from mechmm.zoo.planted.tasks import (
    backup_heads,
    color_at_cell,
    copy_from_text,
    count_to_two,
    prior_overridden,
    same_color,
    shape_of_color,
)
from mechmm.zoo.planted.tasks.task import Task

TASKS: Mapping[str, Task] = {
    "color_at_cell": color_at_cell.TASK,
    "shape_of_color": shape_of_color.TASK,
    "same_color": same_color.TASK,
    "count_to_two": count_to_two.TASK,
    "copy_from_text": copy_from_text.TASK,
    "prior_overridden": prior_overridden.TASK,
}
"""Tasks in which every edge of the circuit is necessary."""
REDUNDANT: Mapping[str, Task] = {"backup_heads": backup_heads.TASK}
"""Tasks in which single edges can be spared."""
