"""`oasst chat`: a conversation in the terminal.

`session` does what a typed line asks for, `markdown` shows answers while they come.
"""
