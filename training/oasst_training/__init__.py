"""The training recipe in small, the dialogues it learns, and the demo checkpoint it made (`demo/`)."""
