"""Workers are started once a session; one thread a process keeps two cores from being oversubscribed."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
