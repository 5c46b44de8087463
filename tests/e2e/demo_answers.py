"""What the demo model knows by heart."""

__all__ = ["COINED", "MEME"]

# What a meme is, and who coined the word.
MEME = (
    "A meme is an idea, a joke or a habit that spreads from person to person by being copied and changed. "
    "On the internet it is often a picture with a few funny words."
)
COINED = (
    "Richard Dawkins coined it in his 1976 book The Selfish Gene. "
    'He shortened the Greek word mimema, "that which is imitated", so that it would sound like gene.'
)
