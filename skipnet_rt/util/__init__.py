"""What any room may use and none is about: files of this machine's cache, atomic writes, the machine itself.

Nothing here knows what a network is.
"""
