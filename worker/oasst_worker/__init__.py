"""The worker: claims jobs from the queue, generates with continuous batching, logs every token."""
