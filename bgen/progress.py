"""How long work reports on itself: callbacks that whoever runs it passes in."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Called with a sentence for the user."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is in all."""

Count = Callable[[int, int], None]
"""Called with how much is done, and how much there is in all."""
