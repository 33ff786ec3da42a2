from __future__ import annotations

import hypothesis

# Machines that run tests are slow at times, which is no failure; and a failure repeats.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")
