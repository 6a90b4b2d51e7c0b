"""One thread for torch in tests, set before torch is imported: small work on several threads mostly waits."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
