"""`lavatar bench`: how fast this machine does what lavatar does, beside the plain reference where there is one.

Not `lavatar benchmark`, which trains methods and compares how good they are.
"""
