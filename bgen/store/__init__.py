"""Opening and reading counts.

tensorstore waits half an hour for a server that took a connection and says nothing, unless it is told otherwise before
it is loaded.
"""

from __future__ import annotations

import os

STALLED = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20", "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1"}
"""A connection on which less than one byte a second came for 20 seconds is given up, and the request made again."""

for _name, _value in STALLED.items():
    os.environ.setdefault(_name, _value)
