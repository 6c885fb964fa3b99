"""One thread a test: pytest-xdist runs as many tests at once as there are cores, and threads of two of them would only wait for
each other. Stages that a test starts inherit it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
