import os

from hypothesis import settings

# Before torch starts: the networks of the tests are small, and threads that wait for busy cores make them far slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Times on a busy machine say nothing about the code.
settings.register_profile("faceless", deadline=None)
settings.load_profile("faceless")
