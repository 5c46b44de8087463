"""`oasst top`: the service on one screen, drawn anew each second."""
