"""What all tests share: hypothesis without its deadline, since a busy machine is no bug; Triton without a GPU."""

import os

from hypothesis import settings

if os.environ.get("TITAN_ADAM_MINI_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whoever does so first

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
