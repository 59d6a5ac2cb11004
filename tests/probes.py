"""What `strength` finds where nothing is attacked, for tests of what surrounds it."""

from __future__ import annotations

NO_ATTACK = dict.fromkeys(("probe_clean", "probe_attacked", "probe_finer"), 0.0)
