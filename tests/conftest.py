import os

# Before torch starts: the networks of the tests are small, and threads that wait for busy cores make them far slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
