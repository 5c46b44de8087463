"""The worker: claims jobs from the queue, generates with continuous batching, logs every token."""

import os

# Idle OpenMP threads spin by default. Beside a gateway and Redis on the same cores a spinning thread keeps away the
# very thread it waits for, and a step takes ten times as long. OpenMP reads this once, when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
